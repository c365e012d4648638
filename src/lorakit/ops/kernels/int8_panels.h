/* The layout in which int8 matmuls read weights, with matrix tiles (int8_tiles.h) and with dot products
 * (int8_vectors.h). A panel has PANEL columns. Four values that follow each other along the summed dimension are one
 * element of 4 bytes; a row of a tile has these elements of EDGE columns, and the next row has the next four values. */

#if defined(DOTS) && defined(__AVX512VNNI__)
#define INT8_MATMULS 1
#define TILE_STEP 64    /* int8 values of a column in a tile */
#define TILE_BYTES 1024 /* EDGE rows of EDGE elements */
#define PANEL 32        /* columns of a panel, and rows of a block: two tiles each */

/* rearranges rows [at, at + PANEL) of Q (·, n), whose products with rows are sums over n */
static void pack_rows(const int8_t *Q, int64_t at, int64_t n, int64_t unused, __m512i flip, int8_t *to) {
    (void)unused;
    for (int64_t k = 0; k < n; k += TILE_STEP)
        for (int half = 0; half < 2; half++, to += TILE_BYTES)
            transpose_tile(Q + (at + EDGE * half) * n + k, n, flip, to);
}

/* rearranges columns [at, at + PANEL) of Q (n, width), whose products with rows are sums over n */
static void pack_columns(const int8_t *Q, int64_t at, int64_t n, int64_t width, __m512i flip, int8_t *to) {
    int32_t lanes[16];
    for (int i = 0; i < 16; i++) lanes[i] = i % 4 * 4 + i / 4;
    /* transposes 4 × 4 lanes, and then 4 × 4 bytes in each quarter */
    const __m512i by_lane = _mm512_loadu_si512(lanes);
    const __m512i by_byte = _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    for (int64_t k = 0; k < n; k += TILE_STEP)
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < EDGE; i++, to += 64) {
                const int8_t *from = Q + (k + 4 * i) * width + at + EDGE * half;
                __m512i four = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)from));
                four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(from + width)), 1);
                four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(from + 2 * width)), 2);
                four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(from + 3 * width)), 3);
                four = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(by_lane, four), by_byte);
                _mm512_storeu_si512(to, _mm512_xor_si512(four, flip));
            }
}
#endif
