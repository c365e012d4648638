/* Int8 matmuls with the matrix unit AMX, and what follows them, in one pass: integer sums stay in the cache until they
 * are scaled, added and rounded. int8.h has the same steps for sums that another library computes. A thread rearranges
 * the weights of some columns, in panels of PANEL columns, as the unit reads them, and uses them for all rows. All sizes
 * along the summed dimension are multiples of TILE_STEP, or of LOW_STEP for bf16, and all numbers of columns are
 * multiples of PANEL. */

#ifdef TILES
#define TILE_STEP 64 /* int8 values in a row of a tile */
#define PANEL 32     /* columns of a panel, and rows of a block: two tiles each */
#define LOW_STEP 32  /* bf16 values in a row of a tile */
#define TILE_BYTES 1024
#define PACKED_BYTES (1 << 19) /* bytes of weights that a thread keeps rearranged, so that they stay in its cache */

/* rearranges rows [at, at + PANEL) of Q (·, n), whose products with rows are sums over n */
static void pack_rows(const int8_t *Q, int64_t at, int64_t n, int64_t unused, int8_t *to) {
    (void)unused;
    for (int64_t k = 0; k < n; k += TILE_STEP)
        for (int half = 0; half < 2; half++, to += TILE_BYTES) transpose_tile(Q + (at + EDGE * half) * n + k, n, to);
}

/* rearranges columns [at, at + PANEL) of Q (n, width), whose products with rows are sums over n */
static void pack_columns(const int8_t *Q, int64_t at, int64_t n, int64_t width, int8_t *to) {
    int8_t order[64];
    for (int i = 0; i < 64; i++) order[i] = (int8_t)(i % 4 * 16 + i / 4);
    __m512i by_column = _mm512_loadu_si512(order);
    for (int64_t k = 0; k < n; k += TILE_STEP)
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < EDGE; i++, to += 64) {
                const int8_t *from = Q + (k + 4 * i) * width + at + EDGE * half;
                __m512i four = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)from));
                four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(from + width)), 1);
                four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(from + 2 * width)), 2);
                four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(from + 3 * width)), 3);
                _mm512_storeu_si512(to, _mm512_permutexvar_epi8(by_column, four));
            }
}

/* sums (PANEL, PANEL) = a·b for PANEL rows of a, with n values each, and a packed panel b */
static void multiply_block(const int8_t *a, int64_t n, const int8_t *b, int32_t *sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < n; k += TILE_STEP, b += 2 * TILE_BYTES) {
        _tile_loadd(4, a + k, n);
        _tile_loadd(6, b, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, b + TILE_BYTES, 64);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, a + EDGE * n + k, n);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, sums, PANEL * 4);
    _tile_stored(1, sums + EDGE, PANEL * 4);
    _tile_stored(2, sums + EDGE * PANEL, PANEL * 4);
    _tile_stored(3, sums + EDGE * PANEL + EDGE, PANEL * 4);
}

static inline __m512 scaled_sums(const int32_t *sums, float scale) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums)), _mm512_set1_ps(scale));
}

typedef struct { /* one thread's buffers */
    float *base;
    int8_t *panels, *rows;
    number *left;
    int32_t *sums;
    float *low;
} Workroom;

static int make_workroom(Workroom *room, int64_t n, int64_t k, int64_t panels, int *status) {
    size_t bytes[] = {(size_t)(panels * PANEL * n), (size_t)(PANEL * n), (size_t)(PANEL * k * 2), PANEL * PANEL * 4,
                      PANEL * PANEL * 4};
    size_t total = 64;
    for (int i = 0; i < 5; i++) total += bytes[i] = (bytes[i] + 63) / 64 * 64;
    room->base = scratch(total / sizeof(float), status);
    if (!room->base) return 0;
    int8_t *at = (int8_t *)(((uintptr_t)room->base + 63) / 64 * 64);
    room->panels = at, at += bytes[0];
    room->rows = at, at += bytes[1];
    room->left = (number *)at, at += bytes[2];
    room->sums = (int32_t *)at, at += bytes[3];
    room->low = (float *)at;
    return 1;
}

/* returns how many panels a thread rearranges at a time */
static int64_t panels_at_once(int64_t columns, int64_t n, int threads) {
    int64_t each = (columns / PANEL + threads - 1) / threads, fit = PACKED_BYTES / (PANEL * n);
    return fit < 1 ? 1 : shorter(each, fit);
}

/* returns `count` rows of `bytes` bytes, followed by zeros up to PANEL rows: in `to` if rows are missing */
static const void *whole_block(const void *from, int64_t count, size_t bytes, void *to) {
    if (count >= PANEL) return from;
    memcpy(to, from, (size_t)count * bytes);
    memset((char *)to + (size_t)count * bytes, 0, (size_t)(PANEL - count) * bytes);
    return to;
}

/* computes the integer sums of each block of PANEL rows and columns. Before that runs `first`, and after it `then`, for
 * the `count` rows from row i on and the columns from column c on; `a` are the rows of q */
#define EACH_BLOCK(columns, n, k, pack, width, first, then)                                                         \
    int status = DONE;                                                                                              \
    int64_t at_once = panels_at_once(columns, n, threads), bytes = PANEL * (n), panels = (columns) / PANEL;         \
    _Pragma("omp parallel num_threads(threads)") {                                                                  \
        Workroom room;                                                                                              \
        int ready = make_workroom(&room, n, k, at_once, &status);                                                   \
        Tiles outside = begin_tiles();                                                                              \
        _Pragma("omp for schedule(static)") for (int64_t begin = 0; begin < panels; begin += at_once) {             \
            int64_t some = shorter(at_once, panels - begin);                                                        \
            for (int64_t p = 0; ready && p < some; p++) pack(Q, (begin + p) * PANEL, n, width, room.panels + p * bytes); \
            for (int64_t i = 0; ready && i < rows; i += PANEL) {                                                    \
                int64_t count = shorter(PANEL, rows - i);                                                           \
                const int8_t *a = whole_block(q + i * (n), count, (size_t)(n), room.rows);                          \
                for (int64_t p = 0; p < some; p++) {                                                                \
                    int64_t c = (begin + p) * PANEL;                                                                \
                    first;                                                                                          \
                    multiply_block(a, n, room.panels + p * bytes, room.sums);                                       \
                    then;                                                                                           \
                }                                                                                                   \
            }                                                                                                       \
        }                                                                                                           \
        end_tiles(outside);                                                                                         \
        free(room.base);                                                                                            \
    }                                                                                                               \
    return status;

static void output_block(Workroom room, const float *t, const float *s, const number *bias, int64_t k, int64_t count,
                         int64_t out, number *y) {
    for (int64_t i = 0; i < count; i++)
        for (int j = 0; j < PANEL; j += EDGE) {
            __m512 v = bias ? wide16(0xffff, bias + j) : _mm512_setzero_ps();
            if (k) v = _mm512_add_ps(v, _mm512_loadu_ps(room.low + i * PANEL + j));
            v = _mm512_fmadd_ps(scaled_sums(room.sums + i * PANEL + j, t[i]), _mm512_loadu_ps(s + j), v);
            _mm256_storeu_si256((__m256i *)(y + i * out + j), narrow_vector(v));
        }
}

int int8_matmul_output(const int8_t *q, const int8_t *Q, const float *t, const float *s, const number *bias,
                       const number *left, const number *right, int64_t rows, int64_t in, int64_t k, int64_t out,
                       number *y, int threads) {
    const pair *right_pairs = (const pair *)right;
    EACH_BLOCK(out, in, k, pack_rows, in,
               if (k) dots_block(whole_block(left + i * k, count, (size_t)k * 2, room.left), k / 2, right_pairs + c, out,
                                 k / 2, room.low, PANEL, 0, 2, 2),
               output_block(room, t + i, s + c, bias ? bias + c : 0, k, count, out, y + i * out + c))
}

static void gradient_block(Workroom room, const float *u, const float *g, const float *columns, const int64_t *kept,
                           int64_t c, const float *partial, int64_t k, int64_t count, int64_t d, float *total,
                           number *dx) {
    for (int64_t i = 0; i < count; i++)
        for (int j = 0; j < PANEL; j += EDGE) {
            __m512 v = partial ? _mm512_loadu_ps(partial + i * d + j) : _mm512_setzero_ps();
            v = _mm512_fmadd_ps(scaled_sums(room.sums + i * PANEL + j, u[i]), _mm512_loadu_ps(g + j), v);
            _mm512_storeu_ps(dx ? room.low + i * PANEL + j : total + i * d + j, v);
        }
    for (int64_t j = 0; dx && j < k; j++)
        if (kept[j] >= c && kept[j] < c + PANEL)
            for (int64_t i = 0; i < count; i++) room.low[i * PANEL + kept[j] - c] += columns[i * k + j];
    for (int64_t i = 0; dx && i < count; i++)
        for (int j = 0; j < PANEL; j += EDGE) {
            __m512 v = _mm512_add_ps(wide16(0xffff, dx + i * d + j), _mm512_loadu_ps(room.low + i * PANEL + j));
            _mm256_storeu_si256((__m256i *)(dx + i * d + j), narrow_vector(v));
        }
}

int int8_matmul_input_gradient(const int8_t *q, const int8_t *Q, const float *u, const float *g, const float *columns,
                               const int64_t *kept, const float *partial, int64_t rows, int64_t out, int64_t d,
                               int64_t k, float *total, number *dx, int threads) {
    EACH_BLOCK(d, out, 0, pack_columns, d, ,
               gradient_block(room, u + i, g + c, columns + i * k, kept, c, partial ? partial + i * d + c : 0, k, count, d,
                              total ? total + i * d + c : 0, dx ? dx + i * d + c : 0))
}
#endif
