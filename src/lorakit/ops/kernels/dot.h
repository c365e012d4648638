/* bf16 matmuls with dot-product instructions, for operands that fit in the cache. Two consecutive elements along the
 * summed dimension form a pair. Sums are fp32. Without avx512_bf16, nothing here is compiled. */

#if defined(BF16) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define DOTS 1
#include <immintrin.h>

typedef uint32_t pair;

#define VECTOR 16 /* fp32 values, or pairs, in a register */
#define TILE 4    /* rows and vectors of a tile; rows are padded to a multiple of this */
#define TALL 8    /* rows of a tile that is one vector wide: enough independent sums to hide the latency */

static inline int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

/* c = a·b, or c += a·b if `add`; a is (rows, n) pairs by rows, b is (n, columns) pairs, c is (rows, columns) */
static inline __attribute__((always_inline)) void tile(const pair *a, int64_t a_row, const pair *b, int64_t b_row,
                                                       int64_t n, float *c, int64_t c_row, int add, const int rows,
                                                       const int vectors) {
    __m512 sum[TALL][TILE];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[i][v] = add ? _mm512_loadu_ps(c + i * c_row + v * VECTOR) : _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k++) {
        __m512i right[TILE];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) right[v] = _mm512_loadu_si512(b + k * b_row + v * VECTOR);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[i * a_row + k]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], left, (__m512bh)right[v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(c + i * c_row + v * VECTOR, sum[i][v]);
}

/* `tile` for any number of rows that is a multiple of TILE, and of columns that is a multiple of VECTOR */
static void dots_by_vectors(const pair *a, int64_t a_row, const pair *b, int64_t b_row, int64_t n, float *c,
                            int64_t c_row, int64_t rows, int64_t columns, int add) {
    for (int64_t j = 0; j < columns; j += TILE * VECTOR) {
        int64_t vectors = shorter(TILE, (columns - j) / VECTOR);
        for (int64_t i = 0; i < rows;) {
            const pair *left = a + i * a_row;
            float *to = c + i * c_row + j;
            if (vectors == 1 && rows - i >= TALL) {
                tile(left, a_row, b + j, b_row, n, to, c_row, add, TALL, 1);
                i += TALL;
                continue;
            }
            switch (vectors) {
            case 4: tile(left, a_row, b + j, b_row, n, to, c_row, add, TILE, 4); break;
            case 3: tile(left, a_row, b + j, b_row, n, to, c_row, add, TILE, 3); break;
            case 2: tile(left, a_row, b + j, b_row, n, to, c_row, add, TILE, 2); break;
            default: tile(left, a_row, b + j, b_row, n, to, c_row, add, TILE, 1);
            }
            i += TILE;
        }
    }
}

#ifdef TILES
/* `tile` with tile registers, for 1 or 2 tiles of EDGE rows and of EDGE columns; n is a multiple of EDGE */
static inline __attribute__((always_inline)) void dots_block(const pair *a, int64_t a_row, const pair *b, int64_t b_row,
                                                             int64_t n, float *c, int64_t c_row, int add, const int tall,
                                                             const int across) {
    float *below = c + EDGE * c_row;
    if (add) {
        _tile_loadd(0, c, c_row * 4);
        if (across == 2) _tile_loadd(1, c + EDGE, c_row * 4);
        if (tall == 2) _tile_loadd(2, below, c_row * 4);
        if (tall == 2 && across == 2) _tile_loadd(3, below + EDGE, c_row * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < n; k += EDGE) {
        _tile_loadd(4, a + k, a_row * 4);
        _tile_loadd(6, b + k * b_row, b_row * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (across == 2) {
            _tile_loadd(7, b + k * b_row + EDGE, b_row * 4);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (tall == 2) {
            _tile_loadd(5, a + EDGE * a_row + k, a_row * 4);
            _tile_dpbf16ps(2, 5, 6);
            if (across == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_row * 4);
    if (across == 2) _tile_stored(1, c + EDGE, c_row * 4);
    if (tall == 2) _tile_stored(2, below, c_row * 4);
    if (tall == 2 && across == 2) _tile_stored(3, below + EDGE, c_row * 4);
}

/* `dots` for numbers of rows, columns and pairs that are multiples of EDGE */
static void dots_by_tiles(const pair *a, int64_t a_row, const pair *b, int64_t b_row, int64_t n, float *c, int64_t c_row,
                          int64_t rows, int64_t columns, int add) {
    Tiles outside = begin_tiles();
    for (int64_t i = 0; i < rows; i += 2 * EDGE)
        for (int64_t j = 0; j < columns; j += 2 * EDGE) {
            const pair *left = a + i * a_row, *right = b + j;
            float *to = c + i * c_row + j;
            int tall = rows - i > EDGE ? 2 : 1, across = columns - j > EDGE ? 2 : 1;
            if (tall == 2 && across == 2)
                dots_block(left, a_row, right, b_row, n, to, c_row, add, 2, 2);
            else if (tall == 2)
                dots_block(left, a_row, right, b_row, n, to, c_row, add, 2, 1);
            else if (across == 2)
                dots_block(left, a_row, right, b_row, n, to, c_row, add, 1, 2);
            else
                dots_block(left, a_row, right, b_row, n, to, c_row, add, 1, 1);
        }
    end_tiles(outside);
}
#endif

/* c = a·b, or c += a·b if `add`, for numbers of rows that are multiples of TILE, and of columns that are multiples of
 * VECTOR; with tile registers, as far as the numbers of rows and pairs are multiples of EDGE */
static void dots(const pair *a, int64_t a_row, const pair *b, int64_t b_row, int64_t n, float *c, int64_t c_row,
                 int64_t rows, int64_t columns, int add) {
#ifdef TILES
    int64_t tall = rows / EDGE * EDGE, whole = n / EDGE * EDGE;
    if (permitted && tall && whole) {
        dots_by_tiles(a, a_row, b, b_row, whole, c, c_row, tall, columns, add);
        if (whole < n)
            dots_by_vectors(a + whole, a_row, b + whole * b_row, b_row, n - whole, c, c_row, tall, columns, 1);
        a += tall * a_row, c += tall * c_row, rows -= tall;
    }
#endif
    dots_by_vectors(a, a_row, b, b_row, n, c, c_row, rows, columns, add);
}

/* rounds a vector to nearest, ties to even, like `narrow` */
static inline __m256i narrow_vector(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }

/* pairs up two rows: element j of the result is (even[j], odd[j]) */
static inline __m512i paired(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

/* pairs up rows 2i and 2i + 1 of `from` (count rows, columns a multiple of VECTOR); missing rows count as zero */
static void pair_rows(const number *from, int64_t row, int64_t count, int64_t columns, pair *to, int64_t to_row,
                      int64_t to_rows) {
    for (int64_t i = 0; i < to_rows; i++)
        for (int64_t j = 0; j < columns; j += VECTOR) {
            const number *at = from + 2 * i * row + j;
            __m256i none = _mm256_setzero_si256();
            __m256i even = 2 * i < count ? _mm256_loadu_si256((const __m256i *)at) : none;
            __m256i odd = 2 * i + 1 < count ? _mm256_loadu_si256((const __m256i *)(at + row)) : none;
            _mm512_storeu_si512(to + i * to_row + j, paired(even, odd));
        }
}

/* transposes pairs along the columns of `from`: to[j][i] is the pair j of row i, for `to_row` rows, zero from `count` */
static void transpose_pairs(const number *from, int64_t row, int64_t count, int64_t pairs, pair *to, int64_t to_row) {
    __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i at = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)row));
    for (int64_t i = 0; i < to_row; i += VECTOR) {
        int64_t left = count - i;
        __mmask16 held = left >= VECTOR ? 0xffff : left <= 0 ? 0 : (__mmask16)((1 << left) - 1);
        for (int64_t j = 0; j < pairs; j++)
            _mm512_storeu_si512(to + j * to_row + i, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), held, at,
                                                                               from + i * row + 2 * j, 2));
    }
}

/* transposes VECTOR rows of VECTOR 4-byte elements, after a bitwise XOR with `flip` */
static void transpose_tile(const int8_t *from, int64_t row, __m512i flip, int8_t *to) {
    __m512i a[VECTOR], b[VECTOR];
#pragma GCC unroll 16
    for (int i = 0; i < VECTOR; i++) a[i] = _mm512_xor_si512(_mm512_loadu_si512(from + i * row), flip);
#pragma GCC unroll 8
    for (int i = 0; i < VECTOR; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < VECTOR; i += 4) { /* a[i + c]: column 4·lane + c of rows i to i + 3 */
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]), a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) { /* 4 × 4 blocks of lanes */
        __m512i p = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x44), q = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xee);
        __m512i r = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x44), s = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xee);
        _mm512_storeu_si512(to + 64 * c, _mm512_shuffle_i32x4(p, r, 0x88));
        _mm512_storeu_si512(to + 64 * (c + 4), _mm512_shuffle_i32x4(p, r, 0xdd));
        _mm512_storeu_si512(to + 64 * (c + 8), _mm512_shuffle_i32x4(q, s, 0x88));
        _mm512_storeu_si512(to + 64 * (c + 12), _mm512_shuffle_i32x4(q, s, 0xdd));
    }
}
#endif
