/* Int8 matmuls of blocks with AVX-512 (VNNI), for int8_matmul.h. The instruction multiplies unsigned by signed values
 * and adds four products to an int32 without saturation. The weights of a panel are therefore stored plus MIDDLE, and
 * each sum starts at the correction of its row: minus MIDDLE times the sum of the row. */

#ifdef INT8_MATMULS
#define TALLEST 11 /* rows that share a load of weights; a third of PANEL */
#define FOURS 4    /* elements of 4 bytes between two tests of the loop */
#define COMPILED_ONCE static __attribute__((noinline)) /* one copy of the long code, which takes long to compile */

/* corrections (PANEL,) of PANEL rows of a */
COMPILED_ONCE void correct_rows(const int8_t *a, int64_t n, int32_t *corrections) {
    const __m512i middle = _mm512_set1_epi8((char)MIDDLE);
    for (int i = 0; i < PANEL; i++, a += n) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t k = 0; k < n; k += TILE_STEP) sum = _mm512_dpbusd_epi32(sum, middle, _mm512_loadu_si512(a + k));
        corrections[i] = -_mm512_reduce_add_epi32(sum);
    }
}

/* sums (rows, PANEL) = a·b for rows of n values, and a packed panel b */
static inline __attribute__((always_inline)) void multiply_rows(const int8_t *a, int64_t n, const int8_t *b,
                                                                const int32_t *corrections, int32_t *sums,
                                                                const int rows) {
    __m512i sum[TALLEST][2];
    const int8_t *row[TALLEST]; /* one pointer per row: addresses in the loop need no other instructions */
#pragma GCC unroll 11
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = _mm512_set1_epi32(corrections[i]), row[i] = a + i * n;
    for (int64_t k = 0; k < n; b += TILE_BYTES)
        for (const int8_t *end = b + TILE_BYTES; b < end; b += 64 * FOURS, k += 4 * FOURS)
#pragma GCC unroll 4
            for (int g = 0; g < FOURS; g++) {
                __m512i first = _mm512_loadu_si512(b + 64 * g), second = _mm512_loadu_si512(b + TILE_BYTES + 64 * g);
#pragma GCC unroll 11
                for (int i = 0; i < rows; i++) {
                    int32_t four;
                    memcpy(&four, row[i] + k + 4 * g, sizeof four);
                    sum[i][0] = _mm512_dpbusd_epi32(sum[i][0], first, _mm512_set1_epi32(four));
                    sum[i][1] = _mm512_dpbusd_epi32(sum[i][1], second, _mm512_set1_epi32(four));
                }
            }
#pragma GCC unroll 11
    for (int i = 0; i < rows; i++) {
        _mm512_storeu_si512(sums + i * PANEL, sum[i][0]);
        _mm512_storeu_si512(sums + i * PANEL + EDGE, sum[i][1]);
    }
}

/* sums (PANEL, PANEL) = a·b for the first `count` of PANEL rows */
COMPILED_ONCE void multiply_with_vectors(const int8_t *a, int64_t n, const int8_t *b, const int32_t *corrections,
                                         int64_t count, int32_t *sums) {
    const int i = TALLEST, j = 2 * TALLEST;
    multiply_rows(a, n, b, corrections, sums, TALLEST);
    if (count > i) multiply_rows(a + i * n, n, b, corrections + i, sums + i * PANEL, TALLEST);
    if (count > j) multiply_rows(a + j * n, n, b, corrections + j, sums + j * PANEL, PANEL - 2 * TALLEST);
}

/* low (PANEL, PANEL) = left·right for the first `count` of PANEL rows, with n pairs each */
COMPILED_ONCE void low_rank_with_vectors(const pair *left, int64_t n, const pair *right, int64_t right_row,
                                         int64_t count, float *low) {
    for (int64_t i = 0; i < count; i += TALL)
        tile(left + i * n, n, right, right_row, n, low + i * PANEL, PANEL, 0, TALL, 2);
}
#endif
