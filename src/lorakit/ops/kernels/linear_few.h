/* Linear layers for few rows, as in decoding: y = x·Wᵀ + bias, in fp32, rounded once. W (out, in) is read once, from
 * beginning to end, as nn.Linear stores it. The order in which the products of an element of y are added depends on
 * `in` alone. Its bits therefore depend neither on the number, the order and the values of the other rows nor on the
 * number of threads. The instructions for bf16 values treat denormal numbers as zero.
 *
 * With matrix tiles, rows of W are the rows of a tile, and rows of x its columns, so W is not rearranged. */

#define OUTPUTS 4 /* outputs that share a load of x, without tiles */
#ifdef __AVX512F__
#define SHARING 4 /* rows that share a load of W, without tiles: as many as the registers can hold */
#else
#define SHARING 1
#endif
#define LANES 16 /* partial sums of an element of y, without tiles */

#ifdef DOTS
#define VALUES (2 * LANES) /* values whose products are added by one instruction */
typedef number factor;     /* an element of x in a product */
typedef __m512 lanes;

static inline factor factor_of(number v) { return v; }

static inline lanes add_products(lanes sum, const number *w, const factor *x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_loadu_si512(x));
}
#else
#define VALUES LANES
typedef float factor;
#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512 vector;
#define FUSED(w, x, sum) _mm512_fmadd_ps(w, x, sum)
#elif defined(__FMA__)
#include <immintrin.h>
typedef __m256 vector;
#define FUSED(w, x, sum) _mm256_fmadd_ps(w, x, sum)
#else
typedef float vector;
#ifdef __FP_FAST_FMAF
#define FUSED(w, x, sum) fmaf(w, x, sum)
#else /* the processor cannot fuse the two operations, so no compiler fuses some of them */
#define FUSED(w, x, sum) ((sum) + (w) * (x))
#endif
#endif
#define VECTORS (LANES * sizeof(float) / sizeof(vector))
typedef struct { vector of[VECTORS]; } lanes;

static inline factor factor_of(number v) { return wide(v); }

static inline lanes add_products(lanes sum, const number *w, const factor *x) {
    float wider[VALUES];
    vector left[VECTORS], right[VECTORS];
    for (int l = 0; l < VALUES; l++) wider[l] = wide(w[l]);
    memcpy(left, wider, sizeof left);
    memcpy(right, x, sizeof right);
    for (size_t v = 0; v < VECTORS; v++) sum.of[v] = FUSED(left[v], right[v], sum.of[v]);
    return sum;
}
#endif

/* the sum of the lanes of each element; the order of additions does not depend on the other elements */
static inline void add_lanes(const lanes *elements, float *sums) {
#ifdef __AVX512F__
    __m512 a[OUTPUTS];
    memcpy(a, elements, sizeof a);
    __m512 first = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    __m512 second = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(first, second, 0x44), _mm512_shuffle_ps(first, second, 0xee));
    all = _mm512_add_ps(all, _mm512_shuffle_f32x4(all, all, 0x4e));
    all = _mm512_add_ps(all, _mm512_shuffle_f32x4(all, all, 0xb1));
    _mm_storeu_ps(sums, _mm512_castps512_ps128(all));
#else
    float each[OUTPUTS][LANES];
    memcpy(each, elements, sizeof each);
    for (int o = 0; o < OUTPUTS; o++) {
        for (int half = LANES / 2; half; half /= 2)
            for (int l = 0; l < half; l++) each[o][l] += each[o][l + half];
        sums[o] = each[o][0];
    }
#endif
}

/* y (rows, outs) for rows of x with `width` factors, which are zero from `in` on; `first` prefetches W */
static inline __attribute__((always_inline)) void linear_block(const factor *x, int64_t width, const number *W,
                                                               int64_t W_row, int64_t in, const number *bias,
                                                               number *y, int64_t out, const int first,
                                                               const int rows, const int outs) {
    lanes sum[SHARING][OUTPUTS] = {0};
    number last[VALUES] = {0};
    int64_t whole = in / VALUES * VALUES;
    for (int64_t j = 0; j < whole; j += VALUES)
#pragma GCC unroll 4
        for (int o = 0; o < outs; o++) {
            const number *w = W + o * W_row + j;
            if (first) prefetch(w, VALUES);
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++) sum[i][o] = add_products(sum[i][o], w, x + i * width + j);
        }
    for (int o = 0; whole < in && o < outs; o++) {
        memcpy(last, W + o * W_row + whole, (size_t)(in - whole) * sizeof(number));
        for (int i = 0; i < rows; i++) sum[i][o] = add_products(sum[i][o], last, x + i * width + whole);
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        float sums[OUTPUTS];
        add_lanes(sum[i], sums);
        for (int o = 0; o < outs; o++) y[i * out + o] = narrow(sums[o] + (bias ? wide(bias[o]) : 0.0f));
    }
}

/* y (rows, outs) for any number of rows */
static inline __attribute__((always_inline)) void linear_outputs(const factor *x, int64_t width, const number *W,
                                                                 int64_t W_row, int64_t in, const number *bias,
                                                                 int64_t rows, number *y, int64_t out,
                                                                 const int outs) {
    int64_t i = 0;
#define ROWS_OF(count)                                                                                        \
    for (; rows - i >= count; i += count)                                                                     \
        if (i) linear_block(x + i * width, width, W, W_row, in, bias, y + i * out, out, 0, count, outs);      \
        else linear_block(x, width, W, W_row, in, bias, y, out, 1, count, outs);
    ROWS_OF(SHARING)
    ROWS_OF(1)
#undef ROWS_OF
}

static int linear_with_vectors(const number *x, const number *W, const number *bias, int64_t W_row, int64_t rows,
                               int64_t in, int64_t out, number *y, int threads) {
    int status = DONE;
    int64_t width = (in + VALUES - 1) / VALUES * VALUES;
    factor *factors = (factor *)scratch((size_t)(rows * width), &status);
    if (!factors) return status;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < width; j++) factors[i * width + j] = j < in ? factor_of(x[i * in + j]) : 0;
    ROWS(block, (out + OUTPUTS - 1) / OUTPUTS) {
        int64_t o = block * OUTPUTS, end = shorter(o + OUTPUTS, out);
        if (end - o == OUTPUTS)
            linear_outputs(factors, width, W + o * W_row, W_row, in, bias ? bias + o : 0, rows, y + o, out, OUTPUTS);
        else
            for (; o < end; o++)
                linear_outputs(factors, width, W + o * W_row, W_row, in, bias ? bias + o : 0, rows, y + o, out, 1);
    }
    free(factors);
    return status;
}

#if defined(TILES) && defined(DOTS)
#define LINEAR_TILES 1
#define ROW_OF_TILE (2 * EDGE)      /* values in a row of a tile */
#define TWO (2 * EDGE)              /* outputs, and rows, that are computed together: two tiles each */
#define PAIRS_OF_TILE (EDGE * EDGE)
#define SHORT_ROWS (1 << 16)        /* bytes of TWO rows of W up to which it is prefetched; longer ones gain nothing */

typedef struct {
    const number *x, *W, *bias;
    int64_t W_row, rows, in, out, steps; /* steps: tiles of a row; the last may have fewer values */
    number *y;
} Linear;

/* arranges `count` rows of x, at most TWO, as `across` tiles for each step, whose rows have one pair of each row of x;
 * the rest is zero */
static void linear_pairs(Linear s, const number *x, int64_t count, int64_t across, pair *to) {
    number rows[EDGE * ROW_OF_TILE] = {0};
    for (int64_t half = 0; half < across; half++) {
        int64_t held = shorter(EDGE, count - half * EDGE);
        memset(rows, 0, sizeof rows);
        for (int64_t k = 0; k < s.steps; k++) {
            int64_t j = k * ROW_OF_TILE, values = shorter(ROW_OF_TILE, s.in - j);
            if (values < ROW_OF_TILE) memset(rows, 0, sizeof rows);
            for (int64_t i = 0; i < held; i++)
                memcpy(rows + i * ROW_OF_TILE, x + (half * EDGE + i) * s.in + j, (size_t)values * sizeof(number));
            transpose_tile((const int8_t *)rows, sizeof(number) * ROW_OF_TILE, _mm512_setzero_si512(),
                           (int8_t *)(to + (k * across + half) * PAIRS_OF_TILE));
        }
    }
}

/* sums (TWO, TWO) of outputs and rows, for `tall` tiles of outputs and `across` tiles of rows; `last` has the values of
 * the outputs after `whole` steps, or is null; what is `ahead` bytes behind W is prefetched, unless that is 0 */
static inline __attribute__((always_inline)) void linear_tiles(const number *W, int64_t W_row, int64_t whole,
                                                               const number *last, const pair *x, int64_t ahead,
                                                               float *sums, const int tall, const int across) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < whole + (last != 0); k++, x += across * PAIRS_OF_TILE) {
        const number *w = k < whole ? W + k * ROW_OF_TILE : last;
        int64_t row = (k < whole ? W_row : ROW_OF_TILE) * (int64_t)sizeof(number);
        for (int64_t i = 0; ahead && i < tall * EDGE; i++)
            __builtin_prefetch((const void *)((uintptr_t)W + (uintptr_t)(ahead + (k * tall * EDGE + i) * 64)), 0, 2);
        _tile_loadd(4, w, row);
        _tile_loadd(6, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (across == 2) {
            _tile_loadd(7, x + PAIRS_OF_TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (tall == 2) {
            _tile_loadd(5, (const int8_t *)w + EDGE * row, row);
            _tile_dpbf16ps(2, 5, 6);
            if (across == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, TWO * 4);
    if (across == 2) _tile_stored(1, sums + EDGE, TWO * 4);
    if (tall == 2) _tile_stored(2, sums + EDGE * TWO, TWO * 4);
    if (tall == 2 && across == 2) _tile_stored(3, sums + EDGE * TWO + EDGE, TWO * 4);
}

/* writes `count` rows of y from row i on, and `outs` outputs from o on, from sums (TWO, TWO) of outputs and rows */
static void linear_rounded(Linear s, const float *sums, int64_t o, int64_t outs, int64_t i, int64_t count) {
    float turned[PAIRS_OF_TILE];
    for (int64_t a = 0; a < outs; a += EDGE)
        for (int64_t b = 0; b < count; b += EDGE) {
            __mmask16 held = first_lanes(outs - a);
            __m512 plus = s.bias ? wide16(held, s.bias + o + a) : _mm512_setzero_ps();
            transpose_tile((const int8_t *)(sums + a * TWO + b), TWO * 4, _mm512_setzero_si512(), (int8_t *)turned);
            for (int64_t r = 0; r < shorter(EDGE, count - b); r++) {
                __m512 v = _mm512_add_ps(_mm512_loadu_ps(turned + r * EDGE), plus);
                _mm256_mask_storeu_epi16(s.y + (i + b + r) * s.out + o + a, held, narrow_vector(v));
            }
        }
}

/* y for all rows, and for TWO outputs from o on, or as many as there are; then `room` (TWO, in) is a buffer for them */
static void linear_two(Linear s, int64_t o, const pair *pairs, number *room) {
    int64_t outs = shorter(TWO, s.out - o), whole = s.in / ROW_OF_TILE, width = whole * ROW_OF_TILE, row = s.W_row;
    int64_t block = TWO * row * (int64_t)sizeof(number), ahead = block > SHORT_ROWS ? 0 : block;
    const number *W = s.W + o * row;
    number last[TWO * ROW_OF_TILE] = {0};
    float sums[TWO * TWO];
    for (int64_t i = 0; width < s.in && i < outs; i++)
        memcpy(last + i * ROW_OF_TILE, W + i * row + width, (size_t)(s.in - width) * sizeof(number));
    if (outs % EDGE) { /* a tile is loaded as a whole */
        memset(room, 0, (size_t)(TWO * width) * sizeof(number));
        for (int64_t i = 0; i < outs; i++) memcpy(room + i * width, W + i * row, (size_t)width * sizeof(number));
        W = room, row = width;
    }
    for (int64_t i = 0; i < s.rows; i += TWO, ahead = 0) {
        int64_t count = shorter(TWO, s.rows - i);
        int is_tall = outs > EDGE, is_wide = count > EDGE;
#define TILES_OF(tall, across) \
    linear_tiles(W, row, whole, width < s.in ? last : 0, pairs + i * EDGE * s.steps, ahead, sums, tall, across)
        if (is_tall && is_wide)
            TILES_OF(2, 2);
        else if (is_tall)
            TILES_OF(2, 1);
        else if (is_wide)
            TILES_OF(1, 2);
        else
            TILES_OF(1, 1);
#undef TILES_OF
        linear_rounded(s, sums, o, outs, i, count);
    }
}

static int linear_with_tiles(Linear s, int threads) {
    int status = DONE;
    int64_t groups = (s.rows + TWO - 1) / TWO, pairs = groups * 2 * s.steps * PAIRS_OF_TILE;
    float *base = scratch((size_t)(pairs + TWO * s.in / 2 + EDGE), &status);
    if (!base) return status;
    pair *x = (pair *)(((uintptr_t)base + 63) / 64 * 64);
    number *room = (number *)(x + pairs); /* only one thread uses it */
#pragma omp parallel num_threads(threads)
    {
        Tiles outside = begin_tiles();
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups; g++) {
            int64_t i = g * TWO, count = shorter(TWO, s.rows - i);
            linear_pairs(s, s.x + i * s.in, count, count > EDGE ? 2 : 1, x + i * EDGE * s.steps);
        }
#pragma omp for schedule(static)
        for (int64_t o = 0; o < s.out; o += TWO) linear_two(s, o, x, room);
        end_tiles(outside);
    }
    free(base);
    return status;
}
#endif

/* the largest number of rows for which linear_few_rows is not slower than the matmuls of PyTorch; 0 if it can be */
int most_linear_rows(void) {
#ifdef LINEAR_TILES
    if (permitted) return 64;
#endif
#if defined(BF16) || defined(__AVX512F__)
    return 32;
#else
    return 0;
#endif
}

int linear_few_rows(const number *x, const number *W, const number *bias, int64_t W_row, int64_t rows, int64_t in,
                    int64_t out, number *y, int threads) {
#ifdef LINEAR_TILES
    Linear all = {x, W, bias, W_row, rows, in, out, (in + ROW_OF_TILE - 1) / ROW_OF_TILE, y};
    if (permitted) return linear_with_tiles(all, threads);
#endif
    return linear_with_vectors(x, W, bias, W_row, rows, in, out, y, threads);
}
