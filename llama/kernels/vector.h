// Vectors of fp32, as wide as the machine's, in GCC's and clang's own notation: any processor will do.
//
// bf16 is read in pairs: 2 * kLanes neighbours become two vectors, those at even places and those at odd ones, by a
// shift and a mask. fp32 is read in order. Sums over a row do not care, and `store_pair` puts the order back.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kPair = 2 * kLanes;

typedef float vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t uvec __attribute__((vector_size(4 * kLanes)));
typedef int32_t ivec __attribute__((vector_size(4 * kLanes)));
typedef float vec_any __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t uvec_any __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));

struct bf16 {
    uint16_t bits;
};

struct pair {
    vec a, b;
};

INLINE vec splat(float x) { return vec{} + x; }
INLINE vec load(const float* p) { return *reinterpret_cast<const vec_any*>(p); }
INLINE void store(float* p, vec x) { *reinterpret_cast<vec_any*>(p) = x; }
INLINE void store(uint32_t* p, uvec x) { *reinterpret_cast<uvec_any*>(p) = x; }

INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

INLINE void narrow(float x, float* out) { *out = x; }
INLINE void narrow(float x, bf16* out) {  // to nearest, ties to even; a NaN stays one
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x)
        out->bits = 0x7fc0;
    else
        out->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }
INLINE pair load_pair(const bf16* p) {
    uvec both = *reinterpret_cast<const uvec_any*>(p);
    return {(vec)(both << 16), (vec)(both & 0xffff0000u)};
}

// The first `count` of a pair, zeros behind.
#if defined(__AVX512BW__)
INLINE uint32_t first(long count) { return count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0; }
INLINE pair load_some(const bf16* p, long count) {
    if (count >= kPair) return load_pair(p);
    uvec both = (uvec)_mm512_maskz_loadu_epi16(first(count), p);
    return {(vec)(both << 16), (vec)(both & 0xffff0000u)};
}
INLINE pair load_some(const float* p, long count) {
    if (count >= kPair) return load_pair(p);
    return {(vec)_mm512_maskz_loadu_ps(first(count), p), (vec)_mm512_maskz_loadu_ps(first(count) >> 16, p + kLanes)};
}
#else
template <class T>
INLINE pair load_some(const T* p, long count) {
    if (count >= kPair) return load_pair(p);
    T padded[kPair] = {};
    for (long i = 0; i < count; i++) padded[i] = p[i];
    return load_pair(padded);
}
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
INLINE __m512bh load_dot(const bf16* p, long count) {
    if (count >= kPair) return (__m512bh)_mm512_loadu_si512(p);
    return (__m512bh)_mm512_maskz_loadu_epi16(first(count), p);
}
INLINE vec add_dot(vec total, __m512bh x, __m512bh y) { return (vec)_mm512_dpbf16_ps((__m512)total, x, y); }
#else
INLINE pair load_dot(const bf16* p, long count) { return load_some(p, count); }
#endif
INLINE pair load_dot(const float* p, long count) { return load_some(p, count); }
INLINE vec add_dot(vec total, pair x, pair y) { return total + x.a * y.a + x.b * y.b; }

INLINE uvec narrowed(vec x) {  // bf16 in the upper half of each lane
    uvec bits = (uvec)x;
    uvec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    uvec ordered = (uvec)(x == x);
    return ((rounded & ordered) | (0x7fc00000u & ~ordered)) & 0xffff0000u;
}

INLINE void store_pair(float* p, pair x) {
    store(p, x.a);
    store(p + kLanes, x.b);
}
INLINE void store_pair(bf16* p, pair x) { *reinterpret_cast<uvec_any*>(p) = narrowed(x.b) | (narrowed(x.a) >> 16); }

#if defined(__AVX512BW__)
INLINE void store_some(bf16* p, pair x, long count) {
    _mm512_mask_storeu_epi16(p, first(count), (__m512i)(narrowed(x.b) | (narrowed(x.a) >> 16)));
}
INLINE void store_some(float* p, pair x, long count) {
    _mm512_mask_storeu_ps(p, first(count), (__m512)x.a);
    _mm512_mask_storeu_ps(p + kLanes, first(count) >> 16, (__m512)x.b);
}
#else
template <class T>
INLINE void store_some(T* p, pair x, long count) {
    if (count >= kPair) {
        store_pair(p, x);
    } else {
        T padded[kPair];
        store_pair(padded, x);
        for (long i = 0; i < count; i++) p[i] = padded[i];
    }
}
#endif

INLINE vec larger(vec a, vec b) { return a > b ? a : b; }

#if defined(__AVX512F__)
INLINE float sum(vec x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float largest(vec x) { return _mm512_reduce_max_ps((__m512)x); }
#else
INLINE float sum(vec x) {
    float total = 0;
    for (int i = 0; i < kLanes; i++) total += x[i];
    return total;
}
INLINE float largest(vec x) {
    float best = x[0];
    for (int i = 1; i < kLanes; i++) best = x[i] > best ? x[i] : best;
    return best;
}
#endif

// out[i] = sum(x[i]) for `count` vectors.
template <int count>
INLINE void sums(const vec* x, float* out) {
#if defined(__AVX512F__)
    // A tree that adds two vectors' halves in one register: 3 instructions a vector where a sum alone takes 8.
    UNROLL for (int base = 0; base < count; base += 16) {
        auto at = [&](int i) { return base + i < count ? (__m512)x[base + i] : _mm512_setzero_ps(); };
        __m512 two[8], four[4];
        UNROLL for (int i = 0; i < 8; i++) {
            __m512 a = at(2 * i), b = at(2 * i + 1);
            two[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        }
        UNROLL for (int i = 0; i < 4; i++) {
            __m512d a = (__m512d)two[2 * i], b = (__m512d)two[2 * i + 1];
            four[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
        }
        auto fold = [](__m512 a, __m512 b) {
            return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
        };
        vec all = (vec)fold(fold(four[0], four[1]), fold(four[2], four[3]));
        if (base + 16 <= count) {
            store(out + base, all);
        } else {
            for (int i = 0; base + i < count; i++) out[base + i] = all[i];
        }
    }
#else
    for (int i = 0; i < count; i++) out[i] = sum(x[i]);
#endif
}

// exp(x) to 2 units in the last place; 0 below -87, NaN of a NaN. Not for x above 88.
INLINE vec exponential(vec x) {
    vec clamped = x < -87.0f ? splat(-87.0f) : x;
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
    vec shifted = clamped * 1.44269504f + to_integer;
    vec whole = shifted - to_integer;
    vec rest = clamped - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two parts
    // Cephes' expf polynomial.
    vec p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    vec scale = (vec)(((ivec)shifted - 0x4b400000 + 127) << 23);
    return x < -87.0f ? vec{} : p * scale;
}
