// y = x W^T + b in bf16 for few rows: the weights are read once, at the speed of the memory.
//
// Legend: M rows of x, N rows of W, K columns of both; all rows are contiguous.
//
// A tile is kRows x kColumns sums of kLanes lanes each, summed along K; kColumns rows of W stay in the first-level
// cache while the tiles of all M rows pass over them. Sums are fp32.
//
// Two ways to multiply. AMD's Zen 4 and 5 have a bf16 dot product twice as fast as fp32's multiply-add, so they use
// it. On Intel's it is no faster (one a cycle against two): there x is widened once, W on the way, and the sums are
// multiply-adds, which measured 1.1 to 1.4 times as fast and run on any processor.

#include <vector>

#include "vector.h"

#if defined(__AVX512BF16__) && (defined(__znver4__) || defined(__znver5__))
#define DOT_PRODUCT 1
#endif

namespace {

constexpr int kRows = 4;
constexpr long kBlock = 256;  // rows of x that stay in the second-level cache, widened, while all of W passes over them
constexpr int kColumns = kLanes == 8 ? 3 : 6;  // AVX has 16 registers, the others 32

#if defined(DOT_PRODUCT)
typedef bf16 Input;

template <int rows, int columns>
INLINE void multiply(const bf16* const* x, const bf16* const* w, long k, long count, vec* total) {
    __m512bh weights[columns];
    UNROLL for (int n = 0; n < columns; n++) weights[n] = load_dot(w[n] + k, count);
    UNROLL for (int m = 0; m < rows; m++) {
        __m512bh row = load_dot(x[m] + k, count);
        UNROLL for (int n = 0; n < columns; n++) {
            vec& cell = total[m * columns + n];
            cell = add_dot(cell, row, weights[n]);
        }
    }
}
#else
typedef float Input;  // widened and in the order of `load_pair`, padded with zeros to whole pairs

template <int rows, int columns>
INLINE void multiply(const float* const* x, const bf16* const* w, long k, long count, vec* total) {
    // Halves one after the other: both at once do not fit the registers.
    UNROLL for (int half = 0; half < 2; half++) {
        vec weights[columns];
        UNROLL for (int n = 0; n < columns; n++) {
            pair both = load_some(w[n] + k, count);
            weights[n] = half ? both.b : both.a;
        }
        UNROLL for (int m = 0; m < rows; m++) {
            vec row = load(x[m] + k + half * kLanes);
            UNROLL for (int n = 0; n < columns; n++) total[m * columns + n] += row * weights[n];
        }
    }
}
#endif

template <int rows, int columns>
INLINE void tile(const Input* const* x, const bf16* const* w, const bf16* bias, long K, long n0, bf16* const* y,
                 int stored, const char* ahead, long bytes) {
    vec total[rows * columns] = {};
    long k = 0;
    const long step = (bytes * kPair / (K + 1) + 63) / 64 * 64;  // a few lines at a time: it must not wait for them
    for (; k + kPair <= K; k += kPair) {
        for (long b = 0; b < step; b += 64) __builtin_prefetch(ahead + b, 0, 2);
        ahead += step;
        multiply<rows, columns>(x, w, k, kPair, total);
    }
    if (k < K) multiply<rows, columns>(x, w, k, K - k, total);
    constexpr int padded = (rows * columns + kLanes - 1) / kLanes * kLanes;
    float out[padded];
    sums<rows * columns>(total, out);
    if (bias)
        for (int i = 0; i < rows * columns; i++) out[i] += widen(bias[n0 + i % columns]);
    uint32_t bits[padded];
    UNROLL for (int i = 0; i < padded; i += kLanes) store(bits + i, narrowed(load(out + i)) >> 16);
    for (int m = 0; m < stored; m++)
        for (int n = 0; n < columns; n++) y[m][n0 + n].bits = bits[m * columns + n];
}

template <int columns>
void panel(const Input* x, long stride, const bf16* w, const bf16* bias, bf16* y, long M, long N, long K, long n) {
    const bf16* weights[columns];
    for (int i = 0; i < columns; i++) weights[i] = w + (n + i) * K;
    for (long m = 0; m < M; m += kRows) {
        int rows = M - m < kRows ? M - m : kRows;
        // The rows of W after the next ones come while these are multiplied.
        const long all = columns * K * sizeof(bf16), bytes = all * rows / M;
        const char* ahead = reinterpret_cast<const char*>(w + (n + 2 * columns) * K) + all * m / M;
        const Input* inputs[kRows];
        bf16* outputs[kRows];
        for (int i = 0; i < kRows; i++) {  // a row too few: the last one again, not stored
            long row = m + (i < rows ? i : rows - 1);
            inputs[i] = x + row * stride;
            outputs[i] = y + row * N;
        }
        if (rows == 1)
            tile<1, columns>(inputs, weights, bias, K, n, outputs, 1, ahead, bytes);
        else if (rows == 2)
            tile<2, columns>(inputs, weights, bias, K, n, outputs, 2, ahead, bytes);
        else
            tile<kRows, columns>(inputs, weights, bias, K, n, outputs, rows, ahead, bytes);
    }
}

// Up to kBlock rows.
void block(const bf16* x, const bf16* w, const bf16* bias, bf16* y, long M, long N, long K, int threads) {
#if defined(DOT_PRODUCT)
    const bf16* inputs = x;
    const long stride = K;
#else
    static thread_local std::vector<float> widened;
    const long stride = (K + kPair - 1) / kPair * kPair;
    if (widened.size() < static_cast<size_t>(M * stride)) widened.resize(M * stride);
    float* inputs = widened.data();
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long m = 0; m < M; m++)
        for (long k = 0; k < K; k += kPair) store_pair(inputs + m * stride + k, load_some(x + m * K + k, K - k));
#endif
    const long panels = (N + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long p = 0; p < panels; p++) {
        long n = p * kColumns;
        if (n + kColumns <= N)
            panel<kColumns>(inputs, stride, w, bias, y, M, N, K, n);
        else
            for (; n < N; n++) panel<1>(inputs, stride, w, bias, y, M, N, K, n);
    }
}

}  // namespace

extern "C" {

// Rows up to which this is faster than a matrix library: measured on Intel without matrix units (101 to 84 GFLOP/s at
// 512 and at 2,048 rows); the others' limits are where the memory stops to bind.
#if defined(__AMX_BF16__) || defined(DOT_PRODUCT)
long linear_max_rows() { return 16; }
#elif defined(__AVX512F__)
long linear_max_rows() { return 4096; }
#else
long linear_max_rows() { return 8; }
#endif

void linear_bf16(const bf16* x, const bf16* w, const bf16* bias, bf16* y, long M, long N, long K, int threads) {
    for (long m = 0; m < M; m += kBlock)
        block(x + m * K, w, bias, y + m * N, M - m < kBlock ? M - m : kBlock, N, K, threads);
}

}  // extern "C"
