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
void rms_norm(const T* inputs, const T* weight, T* outputs, long rows, long dim, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long row = 0; row < rows; row++) {
        const T* x = inputs + row * dim;
        T* y = outputs + row * dim;
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
void rotate_halves(const T* inputs, const float* cos, const float* sin, T* outputs, long tokens, long heads, long pairs,
                   int threads) {
    const long padded = (pairs + kPair - 1) / kPair * kPair;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long t = 0; t < tokens; t++) {
        // A token's row of the tables, in the order of `load_pair`.
        static thread_local std::vector<float> tables;
        tables.resize(2 * padded);
        float *c = tables.data(), *s = c + padded;
        for (long p = 0; p < pairs; p++) {
            const long lane = p % kPair;
            const long place = sizeof(T) == 2 ? p - lane + lane % 2 * kLanes + lane / 2 : p;
            c[place] = cos[t * pairs + p];
            s[place] = sin[t * pairs + p];
        }
        const T* x = inputs + t * heads * 2 * pairs;
        T* y = outputs + t * heads * 2 * pairs;
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
void rotate_neighbours(const T* x, const float* cos, const float* sin, T* y, long tokens, long heads, long pairs,
                       int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < heads; h++)
            for (long p = 0; p < pairs; p++) {
                const long at = ((t * heads + h) * pairs + p) * 2, turn = t * pairs + p;
                const float a = widen(x[at]), b = widen(x[at + 1]);
                narrow(a * cos[turn] - b * sin[turn], &y[at]);
                narrow(b * cos[turn] + a * sin[turn], &y[at + 1]);
            }
}

// silu(gate) * up, llama/activation.py
template <class T>
void silu_product(const T* gate, const T* up, T* y, long count, int threads) {
    auto silu = [](vec x) {
        vec minus = -x;
        return x / (exponential(minus > 88.0f ? splat(88.0f) : minus) + 1.0f);
    };
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long i = 0; i < count; i += kPair) {
        pair g = load_some(gate + i, count - i), u = load_some(up + i, count - i);
        pair active = rounded({silu(g.a), silu(g.b)}, gate);
        store_some(y + i, {active.a * u.a, active.b * u.b}, count - i);
    }
}

}  // namespace

extern "C" {

#define ELEMENTWISE(T, suffix)                                                                                         \
    void rms_norm_##suffix(const T* x, const T* weight, T* y, long rows, long dim, float eps, int threads) {           \
        rms_norm(x, weight, y, rows, dim, eps, threads);                                                               \
    }                                                                                                                  \
    void rotate_##suffix(const T* x, const float* cos, const float* sin, T* y, long tokens, long heads, long pairs,    \
                         int half, int threads) {                                                                      \
        (half ? rotate_halves<T> : rotate_neighbours<T>)(x, cos, sin, y, tokens, heads, pairs, threads);               \
    }                                                                                                                  \
    void silu_product_##suffix(const T* gate, const T* up, T* y, long count, int threads) {                            \
        silu_product(gate, up, y, count, threads);                                                                     \
    }
ELEMENTWISE(bf16, bf16)
ELEMENTWISE(float, f32)

}  // extern "C"
