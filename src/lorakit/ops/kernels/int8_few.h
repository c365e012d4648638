/* Int8 linear layers for few rows, as in decoding: one function quantizes the rows, multiplies, and finishes the
 * outputs. The time is that of reading the weight, which is read once, from beginning to end. The results have the bits
 * of int8_quantize, an exact integer matmul and int8_output. */

#define MOST_ROWS 32 /* MOST_ROWS in compiled.py */
#define NEAR 16      /* outputs that are finished together */
#define STEP 64      /* int8 values in a register; quantized rows are padded to a multiple of this */
#define MIDDLE 128   /* quantized rows are stored plus this, because the instruction multiplies unsigned by signed values */

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>

#define SIDE 4 /* rows, and outputs, of a tile */

int has_int8_dots(void) { return 1; }

/* sums (rows, n) of a tile; `first` prefetches and computes the corrections (outs), which the other tiles read */
static inline __attribute__((always_inline)) void few_tile(const uint8_t *x, int64_t padded, const int8_t *q, int64_t d,
                                                           int64_t n, int32_t *corrections, int32_t *sums,
                                                           const int first, const int rows, const int outs) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum[SIDE][SIDE], total[SIDE];
    for (int o = 0; o < outs; o++) {
        total[o] = _mm512_setzero_si512();
        for (int i = 0; i < rows; i++) sum[i][o] = _mm512_setzero_si512();
    }
    for (int64_t j = 0; j < d; j += STEP) {
        __mmask64 mask = d - j < STEP ? ((__mmask64)1 << (d - j)) - 1 : ~(__mmask64)0;
        __m512i weight[SIDE];
#pragma GCC unroll 4
        for (int o = 0; o < outs; o++) {
            const int8_t *from = q + o * d + j;
            weight[o] = _mm512_maskz_loadu_epi8(mask, from);
            if (!first) continue;
            __builtin_prefetch((const void *)((uintptr_t)from + AHEAD), 0, 2);
            total[o] = _mm512_dpbusd_epi32(total[o], ones, weight[o]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            __m512i left = _mm512_loadu_si512(x + i * padded + j);
#pragma GCC unroll 4
            for (int o = 0; o < outs; o++) sum[i][o] = _mm512_dpbusd_epi32(sum[i][o], left, weight[o]);
        }
    }
    for (int o = 0; o < outs; o++) {
        if (first) corrections[o] = _mm512_reduce_add_epi32(total[o]) * MIDDLE;
        for (int i = 0; i < rows; i++) sums[i * n + o] = _mm512_reduce_add_epi32(sum[i][o]) - corrections[o];
    }
}

static inline __attribute__((always_inline)) void few_outputs(const uint8_t *x, int64_t padded, const int8_t *q,
                                                              int64_t d, int64_t rows, int64_t n, int32_t *sums,
                                                              const int outs) {
    int32_t corrections[SIDE];
#define TILE_OF(count)                                                                                      \
    for (; rows - i >= count; i += count)                                                                   \
        if (i) few_tile(x + i * padded, padded, q, d, n, corrections, sums + i * n, 0, count, outs);        \
        else few_tile(x, padded, q, d, n, corrections, sums, 1, count, outs);
    int64_t i = 0;
    TILE_OF(4)
    TILE_OF(2)
    TILE_OF(1)
#undef TILE_OF
}

/* exact products (rows, n) of quantized rows of x and n rows of q */
static void few_sums(const uint8_t *x, int64_t padded, const int8_t *q, int64_t d, int64_t rows, int64_t n,
                     int32_t *sums) {
    int64_t o = 0;
    for (; n - o >= SIDE; o += SIDE) few_outputs(x, padded, q + o * d, d, rows, n, sums + o, SIDE);
    for (; o < n; o++) few_outputs(x, padded, q + o * d, d, rows, n, sums + o, 1);
}
#else
int has_int8_dots(void) { return 0; }

static void few_sums(const uint8_t *x, int64_t padded, const int8_t *q, int64_t d, int64_t rows, int64_t n,
                     int32_t *sums) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t o = 0; o < n; o++) {
            int32_t sum = 0;
            for (int64_t j = 0; j < d; j++) sum += ((int32_t)x[i * padded + j] - MIDDLE) * q[o * d + j];
            sums[i * n + o] = sum;
        }
}
#endif

/* rearranges n rows of `columns` (n, k) as `right` of int8_output, (even/2, n, 2) */
static inline void few_pairs(const number *columns, int64_t k, int64_t n, number *right) {
    for (int64_t pair = 0; pair < k / 2; pair++)
        for (int64_t o = 0; o < n; o++)
            memcpy(right + (pair * n + o) * 2, columns + o * k + pair * 2, 2 * sizeof(number));
    for (int64_t o = 0; k % 2 && o < n; o++) {
        right[(k / 2 * n + o) * 2] = columns[o * k + k - 1];
        right[(k / 2 * n + o) * 2 + 1] = 0;
    }
}

/* quantized rows plus MIDDLE (padded), their scales, and the columns of x that keep their dtype (even) */
static void few_inputs(const number *x, float *factors, const int64_t *kept, int64_t rows, int64_t d, int64_t k,
                       int64_t padded, uint8_t *q, float *t, number *left) {
    int64_t even = k + k % 2;
    for (int64_t c = 0; c < k; c++) factors[kept[c]] = 0.0f;
    for (int64_t i = 0; i < rows; i++) {
        uint8_t *row = q + i * padded;
        t[i] = quantize_row(x + i * d, factors, d, (int8_t *)row);
        for (int64_t j = 0; j < d; j++) row[j] ^= MIDDLE;
        memset(row + d, MIDDLE, (size_t)(padded - d));
        for (int64_t c = 0; c < k; c++) left[i * even + c] = x[i * d + kept[c]];
        if (k % 2) left[i * even + k] = 0;
    }
}

int int8_few_rows(const number *x, const float *g, const int64_t *kept, const int8_t *q, const float *s,
                  const number *columns, const number *bias, int64_t rows, int64_t d, int64_t k, int64_t out, number *y,
                  int threads) {
    int status = DONE;
    int64_t padded = (d + STEP - 1) / STEP * STEP, even = k + k % 2;
    float *factors = scratch((size_t)(d + rows + rows * even + rows * padded / 4), &status);
    if (!factors) return status;
    float *t = factors + d;
    number *left = (number *)(t + rows);
    uint8_t *quantized = (uint8_t *)(left + rows * even);
    memcpy(factors, g, (size_t)d * sizeof(float));
    few_inputs(x, factors, kept, rows, d, k, padded, quantized, t, left);
#pragma omp parallel num_threads(threads)
    {
        number *right = (number *)scratch((size_t)(even * NEAR), &status);
#pragma omp for schedule(static)
        for (int64_t at = 0; at < out; at += NEAR) {
            if (!right) continue;
            int32_t sums[MOST_ROWS * NEAR];
            number made[MOST_ROWS * NEAR];
            int64_t n = shorter(NEAR, out - at), together;
            few_sums(quantized, padded, q + at * d, d, rows, n, sums);
            few_pairs(columns + at * k, k, n, right);
            for (int64_t i = 0; i < rows; i += together) {
                const number *added = bias ? bias + at : 0;
                together = rows - i >= TOGETHER ? TOGETHER : 1;
                if (together == 1)
                    output_rows(1, sums + i * n, t + i, s + at, added, left + i * even, right, even, n, made + i * n);
                else
                    output_rows(TOGETHER, sums + i * n, t + i, s + at, added, left + i * even, right, even, n, made + i * n);
            }
            for (int64_t i = 0; i < rows; i++) memcpy(y + i * out + at, made + i * n, (size_t)n * sizeof(number));
        }
        free(right);
    }
    free(factors);
    return status;
}
