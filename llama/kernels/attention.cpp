// Attention over a paged cache, read through the block tables: nothing is gathered, no mask is made.
//
// Legend: N sequences of a step, H query heads, G key/value heads, R = H / G query heads that share one, D head
// dimension. keys and values are [slots, G, D]; position p of sequence n lies in slot
// tables[n][p / block_size] * block_size + p % block_size. A sequence reads its own slots only, and of its table only
// the entries from the first key it sees to the last: no NaN of another's gets into it.
//
// Keys are taken a tile at a time by an online softmax (Milakov and Gimelshein, arXiv:1805.02867; the tiling is
// FlashAttention's, arXiv:2205.14135): m is the largest score so far, l the sum of exp(score - m), and `out` the sum of
// the values so weighted; a new largest score scales both down. All arithmetic is fp32.
//
// Two loops. Decoding has few rows (R): lanes hold the dimensions of one key, each read once for all R rows, and the
// step is bound by the memory, so the tile after this one is prefetched. A chunk of a prompt has many rows (its
// tokens times R): lanes hold rows, so softmax, mask and sums never cross lanes, and a tile of keys, widened once,
// serves kRowVectors * kLanes of them; it is bound by arithmetic.

#include <cmath>
#include <vector>

#include "vector.h"

namespace {

constexpr int kTile = 64;        // keys of a tile for a chunk
constexpr int kDecodeTile = 32;  // and for decoding, where two tiles share the first-level cache
constexpr int kRowVectors = kLanes == 8 ? 2 : 4;  // AVX has 16 registers, the others 32
constexpr float kNone = -INFINITY;

struct Shape {
    long block_size, H, G, D;
    float scale, softcap;  // softcap 0: none
    long window;           // 0: all keys
    long R() const { return H / G; }
    long padded() const { return (D + kPair - 1) / kPair * kPair; }
    long first_visible(long position) const { return window && position >= window ? position - window + 1 : 0; }
};

struct Span {
    int32_t row, start, end;  // tokens [start, end) of a sequence are rows row, row + 1, ... of the step
};

INLINE vec capped(vec score, float softcap) {  // c * tanh(score / c)
    if (softcap == 0) return score;
    vec twice = score * (2 / softcap);
    twice = twice > 80.0f ? splat(80.0f) : twice;  // tanh is 1 there
    return softcap - 2 * softcap / (exponential(twice) + 1.0f);
}

// Where the keys of positions [begin, begin + count) lie, in elements; behind them the last again, up to `size`.
template <int size>
INLINE void offsets(const Shape& s, const int32_t* table, long begin, long count, long* out) {
    const long row = s.G * s.D;
    for (long j = 0; j < count;) {
        const long position = begin + j, place = position % s.block_size;
        long slot = table[position / s.block_size] * s.block_size + place;
        for (long end = j + s.block_size - place; j < end && j < count; j++) out[j] = slot++ * row;
    }
    for (long j = count; j < size; j++) out[j] = out[count - 1];
}

// Fetches the rows of the next tile, a few cache lines at a time: all at once, the processor would wait for them.
template <class T>
struct Ahead {
    const T *keys, *values;
    const long* offset;
    long count, bytes;  // rows, and what is read of each
    long row = 0, byte = 0;

    INLINE_MEMBER void fetch(long lines) {
        for (; lines > 0 && row < count; lines--) {
            __builtin_prefetch(reinterpret_cast<const char*>(keys + offset[row]) + byte, 0, 2);
            __builtin_prefetch(reinterpret_cast<const char*>(values + offset[row]) + byte, 0, 2);
            byte += 64;
            if (byte >= bytes) byte = 0, row++;
        }
    }
};

// out[r] = out[r] * shrink[r] + sum over keys of weights[r][j] * values[j], for `rows` rows; keys `split` at a time, so
// that enough sums are under way at once.
template <int rows, int split, class T>
INLINE void add_values(const T* values, const long* offset, long count, long D, const float* weights,
                       const float* shrink, float* out, long padded) {
    for (long d = 0; d < D; d += kPair) {
        vec total[rows][split][2] = {};
        for (long j = 0; j < count; j += split) {  // weights beyond `count` are 0
            UNROLL for (int i = 0; i < split; i++) {
                pair value = load_some(values + offset[j + i] + d, D - d);
                UNROLL for (int r = 0; r < rows; r++) {
                    vec weight = splat(weights[r * kDecodeTile + j + i]);
                    total[r][i][0] += weight * value.a;
                    total[r][i][1] += weight * value.b;
                }
            }
        }
        UNROLL for (int r = 0; r < rows; r++) {
            vec a = total[r][0][0], b = total[r][0][1];
            UNROLL for (int i = 1; i < split; i++) a += total[r][i][0], b += total[r][i][1];
            float* place = out + r * padded + d;
            store(place, load(place) * shrink[r] + a);
            store(place + kLanes, load(place + kLanes) * shrink[r] + b);
        }
    }
}

// One query against every key it sees, for the key/value heads [g0, g1). `dim` is D, or 0 for any.
template <long dim, class T>
void decode(const Shape& s, const T* keys, const T* values, const int32_t* table, const T* q, T* out, long position,
            long g0, long g1) {
    const long R = s.R(), padded = s.padded(), heads = (g1 - g0) * R, end = position + 1, D = dim ? dim : s.D;
    static thread_local std::vector<float> buffer;
    buffer.assign(heads * (padded + 2) + R * (kDecodeTile + 1), 0.0f);
    float *sum = buffer.data(), *m = sum + heads * padded, *l = m + heads, *weights = l + heads,
          *shrink = weights + R * kDecodeTile;
    for (long h = 0; h < heads; h++) m[h] = kNone;
    long here[kDecodeTile], next[kDecodeTile];
    long begin = s.first_visible(position), count = end - begin < kDecodeTile ? end - begin : kDecodeTile;
    offsets<kDecodeTile>(s, table, begin, count, next);
    while (begin < end) {
        memcpy(here, next, sizeof here);
        long following = begin + count, coming = end - following < kDecodeTile ? end - following : kDecodeTile;
        if (coming > 0) offsets<kDecodeTile>(s, table, following, coming, next);
        const long bytes = (g1 - g0) * D * sizeof(T);
        Ahead<T> ahead{keys + g0 * D, values + g0 * D, next, coming, bytes};
        const long lines = (coming * ((bytes + 63) / 64) * kLanes + heads * count - 1) / (heads * count);
        for (long g = g0; g < g1; g++) {
            for (long r = 0; r < R; r++) {
                const T* query = q + (g * R + r) * D;
                float* score = weights + r * kDecodeTile;
                const long h = (g - g0) * R + r;
                vec best = splat(kNone);
                for (long j = 0; j < count; j += kLanes) {
                    ahead.fetch(lines);
                    vec total[kLanes] = {};
                    for (long d = 0; d < D; d += kPair) {
                        auto x = load_dot(query + d, D - d);
                        UNROLL for (int i = 0; i < kLanes; i++)
                            total[i] = add_dot(total[i], x, load_dot(keys + here[j + i] + g * D + d, D - d));
                    }
                    sums<kLanes>(total, score + j);
                    vec scores = capped(load(score + j) * s.scale, s.softcap);
                    store(score + j, scores);
                    for (long i = count - j; i < kLanes; i++) score[j + i] = kNone;
                    best = larger(load(score + j), best);
                }
                const float most = largest(best), top = most > m[h] ? most : m[h];
                vec total = {};
                for (long j = 0; j < count; j += kLanes) {
                    vec weight = exponential(load(score + j) - top);
                    store(score + j, weight);
                    total += weight;
                }
                for (long j = (count + kLanes - 1) / kLanes * kLanes; j < kDecodeTile; j++) score[j] = 0;
                shrink[r] = m[h] == top ? 1.0f : expf(m[h] - top);
                l[h] = l[h] * shrink[r] + ::sum(total);
                m[h] = top;
            }
            const T* own = values + g * D;
            for (long r = 0; r < R;) {
                float *weight = weights + r * kDecodeTile, *place = sum + ((g - g0) * R + r) * padded;
                if (R - r >= 4) {
                    add_values<4, 1>(own, here, count, D, weight, shrink + r, place, padded);
                    r += 4;
                } else if (R - r >= 2) {
                    add_values<2, 2>(own, here, count, D, weight, shrink + r, place, padded);
                    r += 2;
                } else {
                    add_values<1, 4>(own, here, count, D, weight, shrink + r, place, padded);
                    r += 1;
                }
            }
        }
        begin = following;
        count = coming;
    }
    for (long h = 0; h < heads; h++)
        for (long d = 0; d < D; d += kPair) {
            const float* place = sum + h * padded + d;
            store_some(out + (g0 * R + h) * D + d, {load(place) / l[h], load(place + kLanes) / l[h]}, D - d);
        }
}

// Rows [first, first + vectors * kLanes) of a chunk for key/value head g; row i is token i / R, head i % R.
template <int vectors, class T>
void chunk(const Shape& s, const T* keys, const T* values, const int32_t* table, const T* q, T* out, Span span, long g,
           long first) {
    constexpr int rows = vectors * kLanes;
    const long R = s.R(), padded = s.padded(), all = (span.end - span.start) * R;
    static thread_local std::vector<float> buffer;
    // Rows lie side by side. Dimensions are in the order of `load_pair`, in queries, keys, values and sums alike.
    buffer.resize(2 * padded * rows + kTile * rows + 2 * kTile * padded);
    float *query = buffer.data(), *sum = query + padded * rows, *weights = sum + padded * rows,
          *key = weights + kTile * rows, *value = key + kTile * padded;
    memset(sum, 0, padded * rows * sizeof(float));
    int32_t position[rows];
    for (long i = 0; i < rows; i++) {
        long row = first + i < all ? first + i : all - 1;  // beyond the last: the last again, not stored
        position[i] = span.start + row / R;
        const T* source = q + ((span.row + row / R) * s.H + g * R + row % R) * s.D;
        for (long d = 0; d < s.D; d += kPair) {
            pair x = load_some(source + d, s.D - d);
            for (int k = 0; k < kLanes; k++) {
                query[(d + k) * rows + i] = x.a[k] * s.scale;
                query[(d + kLanes + k) * rows + i] = x.b[k] * s.scale;
            }
        }
    }
    vec m[vectors], l[vectors];
    UNROLL for (int v = 0; v < vectors; v++) m[v] = splat(kNone), l[v] = vec{};
    const long begin = s.first_visible(position[0]), end = position[rows - 1] + 1;
    for (long tile = begin; tile < end; tile += kTile) {
        const long count = end - tile < kTile ? end - tile : kTile;
        long offset[kTile];
        offsets<kTile>(s, table, tile, count, offset);
        for (long j = 0; j < count; j++)
            for (long d = 0; d < s.D; d += kPair) {
                pair k = load_some(keys + offset[j] + g * s.D + d, s.D - d);
                pair x = load_some(values + offset[j] + g * s.D + d, s.D - d);
                store_pair(key + j * padded + d, k);
                store_pair(value + j * padded + d, x);
            }
        for (long j = 0; j < count; j += 4) {  // keys beyond `count` are left over and masked
            vec total[4][vectors] = {};
            for (long d = 0; d < padded; d++) {
                vec x[vectors];
                UNROLL for (int v = 0; v < vectors; v++) x[v] = load(query + d * rows + v * kLanes);
                UNROLL for (int i = 0; i < 4; i++) {
                    vec y = splat(key[(j + i) * padded + d]);
                    UNROLL for (int v = 0; v < vectors; v++) total[i][v] += x[v] * y;
                }
            }
            UNROLL for (int i = 0; i < 4; i++) UNROLL for (int v = 0; v < vectors; v++)
                store(weights + (j + i) * rows + v * kLanes, capped(total[i][v], s.softcap));
        }
        const bool masked = tile + count - 1 > position[0] || tile < s.first_visible(position[rows - 1]);
        vec shrink[vectors];
        UNROLL for (int v = 0; v < vectors; v++) {
            float* column = weights + v * kLanes;
            if (masked) {
                ivec at;
                memcpy(&at, position + v * kLanes, sizeof at);
                for (long j = 0; j < count; j++) {
                    const int32_t p = tile + j;
                    ivec hidden = at < p;
                    if (s.window) hidden |= at >= static_cast<int32_t>(p + s.window);
                    store(column + j * rows, hidden ? splat(kNone) : load(column + j * rows));
                }
            }
            vec top = m[v];
            for (long j = 0; j < count; j++) top = larger(load(column + j * rows), top);
            vec base = top == kNone ? vec{} : top;  // no key seen yet: -inf - -inf is no number
            shrink[v] = exponential(m[v] - base);
            vec total = {};
            for (long j = 0; j < count; j++) {
                vec weight = exponential(load(column + j * rows) - base);
                store(column + j * rows, weight);
                total += weight;
            }
            l[v] = l[v] * shrink[v] + total;
            m[v] = top;
        }
        for (long d = 0; d < padded; d += 4) {
            vec total[4][vectors];
            UNROLL for (int i = 0; i < 4; i++) UNROLL for (int v = 0; v < vectors; v++)
                total[i][v] = load(sum + (d + i) * rows + v * kLanes) * shrink[v];
            for (long j = 0; j < count; j++) {
                vec x[vectors];
                UNROLL for (int v = 0; v < vectors; v++) x[v] = load(weights + j * rows + v * kLanes);
                UNROLL for (int i = 0; i < 4; i++) {
                    vec y = splat(value[j * padded + d + i]);
                    UNROLL for (int v = 0; v < vectors; v++) total[i][v] += x[v] * y;
                }
            }
            UNROLL for (int i = 0; i < 4; i++) UNROLL for (int v = 0; v < vectors; v++)
                store(sum + (d + i) * rows + v * kLanes, total[i][v]);
        }
    }
    for (long i = 0; i < rows && first + i < all; i++) {
        const long row = first + i;
        const float scale = 1 / l[i / kLanes][i % kLanes];
        T* target = out + ((span.row + row / R) * s.H + g * R + row % R) * s.D;
        for (long d = 0; d < s.D; d += kPair) {
            pair x;
            for (int k = 0; k < kLanes; k++) {
                x.a[k] = sum[(d + k) * rows + i] * scale;
                x.b[k] = sum[(d + kLanes + k) * rows + i] * scale;
            }
            store_some(target + d, x, s.D - d);
        }
    }
}

struct Item {
    long n, g0, g1, first;  // of a chunk: its rows from `first` for head g0; of a decode: first is -1
    int vectors;
};

std::vector<Item> work(const Shape& s, const Span* spans, long N, int threads) {
    std::vector<Item> items;
    // Heads of a sequence are shared out only if there are fewer sequences than threads: one reads rows in order.
    const long share = (s.G * N + threads - 1) / threads;
    for (long n = 0; n < N; n++) {
        const long rows = (spans[n].end - spans[n].start) * s.R();
        if (spans[n].end - spans[n].start == 1 && rows < kLanes) {
            for (long g = 0; g < s.G; g += share) items.push_back({n, g, g + share < s.G ? g + share : s.G, -1, 0});
        } else {
            for (long first = 0; first < rows;) {
                const long left = (rows - first + kLanes - 1) / kLanes;
                const int vectors = left >= kRowVectors ? kRowVectors : left >= 2 ? 2 : 1;
                for (long g = 0; g < s.G; g++) items.push_back({n, g, g + 1, first, vectors});
                first += vectors * kLanes;
            }
        }
    }
    return items;
}

template <class T>
void attention(T* keys, T* values, const T* q, const T* k, const T* v, T* out, const int32_t* tables, long width,
               const Span* spans, long N, const Shape& s, int threads) {
    const long size = s.G * s.D;
    for (long n = 0; n < N; n++)
        for (long p = spans[n].start; p < spans[n].end; p++) {
            const long row = spans[n].row + p - spans[n].start;
            const long slot = tables[n * width + p / s.block_size] * s.block_size + p % s.block_size;
            memcpy(keys + slot * size, k + row * size, size * sizeof(T));
            memcpy(values + slot * size, v + row * size, size * sizeof(T));
        }
    const std::vector<Item> items = work(s, spans, N, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
    for (size_t i = 0; i < items.size(); i++) {
        const Item& item = items[i];
        const int32_t* table = tables + item.n * width;
        const Span span = spans[item.n];
        if (item.first < 0)
            (s.D == 32    ? decode<32, T>
             : s.D == 64  ? decode<64, T>
             : s.D == 128 ? decode<128, T>
                          : decode<0, T>)(s, keys, values, table, q + span.row * s.H * s.D, out + span.row * s.H * s.D,
                                          span.start, item.g0, item.g1);
        else if (item.vectors == 1)
            chunk<1>(s, keys, values, table, q, out, span, item.g0, item.first);
        else if (item.vectors == 2)
            chunk<2>(s, keys, values, table, q, out, span, item.g0, item.first);
        else
            chunk<kRowVectors>(s, keys, values, table, q, out, span, item.g0, item.first);
    }
}

}  // namespace

extern "C" {

#define ATTENTION(name, T)                                                                                             \
    void name(T* keys, T* values, const T* q, const T* k, const T* v, T* out, const int32_t* tables, long width,       \
              const Span* spans, long N, long block_size, long H, long G, long D, float scale, float softcap,          \
              long window, int threads) {                                                                              \
        attention(keys, values, q, k, v, out, tables, width, spans, N, {block_size, H, G, D, scale, softcap, window},  \
                  threads);                                                                                            \
    }
ATTENTION(attention_bf16, bf16)
ATTENTION(attention_f32, float)

}  // extern "C"
