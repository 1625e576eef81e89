// What stands between the products: each one pass, where torch's own operations make three to six.
//
// Roundings to bf16 are where the torch twins have them.

#include <cmath>

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

// llama/rope.py; a pair is (a, b), `apart` elements from each other.
template <class T>
void rotate(const T* x, const float* cos, const float* sin, T* y, long tokens, long heads, long pairs, bool half) {
    const long step = half ? 1 : 2, apart = half ? pairs : 1;
    for (long t = 0; t < tokens; t++, cos += pairs, sin += pairs)
        for (long h = 0; h < heads; h++, x += 2 * pairs, y += 2 * pairs)
            for (long p = 0; p < pairs; p++) {
                const float a = widen(x[p * step]), b = widen(x[p * step + apart]);
                narrow(a * cos[p] - b * sin[p], &y[p * step]);
                narrow(b * cos[p] + a * sin[p], &y[p * step + apart]);
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
        if (half)                                                                                                      \
            rotate(x, cos, sin, y, tokens, heads, pairs, true);                                                        \
        else                                                                                                           \
            rotate(x, cos, sin, y, tokens, heads, pairs, false);                                                       \
    }                                                                                                                  \
    void silu_product_##suffix(const T* gate, const T* up, T* y, long count) { silu_product(gate, up, y, count); }
ELEMENTWISE(bf16, bf16)
ELEMENTWISE(float, f32)

}  // extern "C"
