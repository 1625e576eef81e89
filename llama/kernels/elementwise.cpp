// What stands between the products: each one pass, where torch's own operations make three to six.
//
// Roundings to bf16 are where the torch twins have them.

#include <cmath>
#include <vector>

#include "vector.h"

namespace {

INLINE pair rounded(pair x, const float*) { return x; }
INLINE pair rounded(pair x, const bf16*) { return {(vec)narrowed(x.a), (vec)narrowed(x.b)}; }

// llama/norm.py
template <class T>
void rms_norm(const T* x, const T* weight, T* y, long rows, long dim, float eps) {
    for (long row = 0; row < rows; row++, x += dim, y += dim) {
        vec even = {}, odd = {};
        for (long d = 0; d < dim; d += kPair) {
            pair both = load_some(x + d, dim - d);
            even += both.a * both.a;
            odd += both.b * both.b;
        }
        const float scale = 1 / sqrtf(sum(even + odd) / dim + eps);
        for (long d = 0; d < dim; d += kPair) {
            pair both = load_some(x + d, dim - d), w = load_some(weight + d, dim - d);
            pair quotient = rounded({both.a * scale, both.b * scale}, x);
            store_some(y + d, {quotient.a * w.a, quotient.b * w.b}, dim - d);
        }
    }
}

// llama/rope.py: dimensions i and i + pairs turn together, or 2i and 2i + 1.
template <class T>
void rotate_halves(const T* x, const float* cos, const float* sin, T* y, long tokens, long heads, long pairs) {
    // The tables in the order of `load_pair`.
    const long padded = (pairs + kPair - 1) / kPair * kPair;
    std::vector<float> tables(2 * padded);
    float *c = tables.data(), *s = c + padded;
    for (long t = 0; t < tokens; t++, cos += pairs, sin += pairs) {
        for (long p = 0; p < pairs; p++) {
            const long lane = p % kPair;
            const long place = sizeof(T) == 2 ? p - lane + lane % 2 * kLanes + lane / 2 : p;
            c[place] = cos[p];
            s[place] = sin[p];
        }
        for (long h = 0; h < heads; h++, x += 2 * pairs, y += 2 * pairs)
            for (long p = 0; p < pairs; p += kPair) {
                const long count = pairs - p;
                const pair a = load_some(x + p, count), b = load_some(x + pairs + p, count);
                const pair u = load_pair(c + p), v = load_pair(s + p);
                store_some(y + p, {a.a * u.a - b.a * v.a, a.b * u.b - b.b * v.b}, count);
                store_some(y + pairs + p, {b.a * u.a + a.a * v.a, b.b * u.b + a.b * v.b}, count);
            }
    }
}

template <class T>
void rotate_neighbours(const T* x, const float* cos, const float* sin, T* y, long tokens, long heads, long pairs) {
    for (long t = 0; t < tokens; t++, cos += pairs, sin += pairs)
        for (long h = 0; h < heads; h++, x += 2 * pairs, y += 2 * pairs)
            for (long p = 0; p < pairs; p++) {
                const float a = widen(x[2 * p]), b = widen(x[2 * p + 1]);
                narrow(a * cos[p] - b * sin[p], &y[2 * p]);
                narrow(b * cos[p] + a * sin[p], &y[2 * p + 1]);
            }
}

// silu(gate) * up, llama/activation.py
template <class T>
void silu_product(const T* gate, const T* up, T* y, long count) {
    auto silu = [](vec x) {
        vec minus = -x;
        return x / (exponential(minus > 88.0f ? splat(88.0f) : minus) + 1.0f);
    };
    for (long i = 0; i < count; i += kPair) {
        pair g = load_some(gate + i, count - i), u = load_some(up + i, count - i);
        pair active = rounded({silu(g.a), silu(g.b)}, gate);
        store_some(y + i, {active.a * u.a, active.b * u.b}, count - i);
    }
}

}  // namespace

extern "C" {

#define ELEMENTWISE(T, suffix)                                                                                         \
    void rms_norm_##suffix(const T* x, const T* weight, T* y, long rows, long dim, float eps) {                        \
        rms_norm(x, weight, y, rows, dim, eps);                                                                        \
    }                                                                                                                  \
    void rotate_##suffix(const T* x, const float* cos, const float* sin, T* y, long tokens, long heads, long pairs,    \
                         int half) {                                                                                   \
        (half ? rotate_halves<T> : rotate_neighbours<T>)(x, cos, sin, y, tokens, heads, pairs);                        \
    }                                                                                                                  \
    void silu_product_##suffix(const T* gate, const T* up, T* y, long count) { silu_product(gate, up, y, count); }
ELEMENTWISE(bf16, bf16)
ELEMENTWISE(float, f32)

}  // extern "C"
