/* Int8 matmuls, and what follows them, in one pass: integer sums stay in the cache until they are scaled, added and
 * rounded. int8.h has the same steps for sums that another library computes. A thread rearranges the weights of some
 * columns, in panels (int8_panels.h), and uses them for all rows. int8_tiles.h multiplies the blocks if the caller sets
 * `tiles` and this library has tiles, otherwise int8_vectors.h. All sizes along the summed dimension are multiples of
 * TILE_STEP, and all numbers of columns are multiples of PANEL. */

#ifdef INT8_MATMULS
#define PACKED_BYTES (1 << 19) /* bytes of weights that a thread keeps rearranged, so that they stay in its cache */

#ifdef TILES
#define BY_UNIT(with_tiles, with_vectors) \
    do {                                  \
        if (tiles) {                      \
            with_tiles;                   \
        } else {                          \
            with_vectors;                 \
        }                                 \
    } while (0)
#else
#define BY_UNIT(with_tiles, with_vectors) \
    do {                                  \
        (void)tiles;                      \
        with_vectors;                     \
    } while (0)
#endif

int has_int8_matmuls(void) { return 1; }

static inline __m512 scaled_sums(const int32_t *sums, float scale) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums)), _mm512_set1_ps(scale));
}

typedef struct { /* two low-rank terms, h·Bᵀ + kept·columnsᵀ, which are multiplied as one */
    const number *h, *B, *kept, *columns;
    int64_t h_row, r, k; /* elements between two rows of h; columns of h and of `kept` */
    int64_t width;       /* r + k, filled up with zeros to a number that the unit multiplies; 0 if there are no terms */
} LowRankTerms;

typedef struct { /* one thread's buffers */
    float *base;
    int8_t *panels, *rows;
    number *left; /* PANEL rows of [h | kept] */
    pair *right;  /* for each panel, PANEL columns of [B | columns]ᵀ */
    int32_t *sums, *corrections;
    float *low;
} Workroom;

static int make_workroom(Workroom *room, int64_t n, int64_t width, int64_t panels, int *status) {
    size_t low = (size_t)(PANEL * width * 2);
    size_t bytes[] = {(size_t)(panels * PANEL * n), (size_t)(PANEL * n), low, (size_t)panels * low, PANEL * PANEL * 4,
                      PANEL * 4, PANEL * PANEL * 4};
    size_t total = 64;
    for (int i = 0; i < 7; i++) total += bytes[i] = (bytes[i] + 63) / 64 * 64;
    room->base = scratch(total / sizeof(float), status);
    if (!room->base) return 0;
    int8_t *at = (int8_t *)(((uintptr_t)room->base + 63) / 64 * 64);
    room->panels = at, at += bytes[0];
    room->rows = at, at += bytes[1];
    room->left = (number *)at, at += bytes[2];
    room->right = (pair *)at, at += bytes[3];
    room->sums = (int32_t *)at, at += bytes[4];
    room->corrections = (int32_t *)at, at += bytes[5];
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

/* computes the integer sums of each block of PANEL rows and columns. `with_panel` runs after panel p, with the columns
 * from c on, was rearranged, `with_rows` before the `count` rows from row i on, `then` after each of their blocks */
#define EACH_BLOCK(columns, n, low, pack, width, with_panel, with_rows, then)                                       \
    int status = DONE;                                                                                              \
    int64_t at_once = panels_at_once(columns, n, threads), bytes = PANEL * (n), panels = (columns) / PANEL;         \
    _Pragma("omp parallel num_threads(threads)") {                                                                  \
        Workroom room;                                                                                              \
        int ready = make_workroom(&room, n, low, at_once, &status);                                                 \
        Tiles outside = {0};                                                                                        \
        __m512i flip = _mm512_setzero_si512();                                                                      \
        BY_UNIT(outside = begin_tiles(), flip = _mm512_set1_epi8((char)MIDDLE));                                    \
        _Pragma("omp for schedule(static)") for (int64_t begin = 0; begin < panels; begin += at_once) {             \
            int64_t some = shorter(at_once, panels - begin);                                                        \
            for (int64_t p = 0; ready && p < some; p++) {                                                           \
                int64_t c = (begin + p) * PANEL;                                                                    \
                pack(Q, c, n, width, flip, room.panels + p * bytes);                                                \
                with_panel;                                                                                         \
            }                                                                                                       \
            for (int64_t i = 0; ready && i < rows; i += PANEL) {                                                    \
                int64_t count = shorter(PANEL, rows - i);                                                           \
                const int8_t *a = whole_block(q + i * (n), count, (size_t)(n), room.rows);                          \
                BY_UNIT(, correct_rows(a, n, room.corrections));                                                    \
                with_rows;                                                                                          \
                for (int64_t p = 0; p < some; p++) {                                                                \
                    int64_t c = (begin + p) * PANEL;                                                                \
                    const int8_t *b = room.panels + p * bytes;                                                      \
                    BY_UNIT(multiply_with_tiles(a, n, b, room.sums),                                                \
                            multiply_with_vectors(a, n, b, room.corrections, count, room.sums));                    \
                    then;                                                                                           \
                }                                                                                                   \
            }                                                                                                       \
        }                                                                                                           \
        BY_UNIT(end_tiles(outside), (void)outside);                                                                 \
        free(room.base);                                                                                            \
    }                                                                                                               \
    return status;

/* copies r and then k values to a row of `width`, and fills up the rest with zeros */
static inline void join_row(const number *first, int64_t r, const number *second, int64_t k, int64_t width,
                            number *to) {
    if (r) memcpy(to, first, (size_t)r * 2);
    if (k) memcpy(to + r, second, (size_t)k * 2);
    memset(to + r + k, 0, (size_t)(width - r - k) * 2);
}

/* left (PANEL, width) = [h | kept] for the `count` rows from row i on, followed by zeros */
static void join_left(LowRankTerms s, int64_t i, int64_t count, number *left) {
    for (int64_t row = 0; row < count; row++)
        join_row(s.h + (i + row) * s.h_row, s.r, s.kept + (i + row) * s.k, s.k, s.width, left + row * s.width);
    memset(left + count * s.width, 0, (size_t)((PANEL - count) * s.width) * 2);
}

/* right (width / 2, PANEL) = [B | columns]ᵀ for the columns from c on, in pairs; `row` is a buffer */
static void pair_right(LowRankTerms s, int64_t c, number *row, pair *right) {
    for (int64_t j = 0; j < PANEL; j++) {
        join_row(s.B + (c + j) * s.r, s.r, s.columns + (c + j) * s.k, s.k, s.width, row);
        for (int64_t p = 0; p < s.width / 2; p++) memcpy(right + p * PANEL + j, row + 2 * p, sizeof(pair));
    }
}

/* room.low = room.left·right for `count` rows, and the columns of one panel */
static inline void low_rank_block(Workroom room, const pair *right, int64_t n, int64_t count, int tiles) {
    const pair *left = (const pair *)room.left;
    BY_UNIT(dots_block(left, n, right, PANEL, n, room.low, PANEL, 0, 2, 2),
            low_rank_with_vectors(left, n, right, PANEL, count, room.low));
}

static void output_block(Workroom room, const float *t, const float *s, const number *bias, int is_low_rank,
                         int64_t count, int64_t out, number *y) {
    for (int64_t i = 0; i < count; i++)
        for (int j = 0; j < PANEL; j += EDGE) {
            __m512 v = bias ? wide16(0xffff, bias + j) : _mm512_setzero_ps();
            if (is_low_rank) v = _mm512_add_ps(v, _mm512_loadu_ps(room.low + i * PANEL + j));
            v = _mm512_fmadd_ps(scaled_sums(room.sums + i * PANEL + j, t[i]), _mm512_loadu_ps(s + j), v);
            _mm256_storeu_si256((__m256i *)(y + i * out + j), narrow_vector(v));
        }
}

int int8_matmul_output(const int8_t *q, const int8_t *Q, const float *t, const float *s, const number *bias,
                       const number *h, const number *B, const number *kept, const number *columns, int64_t h_row,
                       int64_t rows, int64_t in, int64_t r, int64_t k, int64_t out, number *y, int tiles,
                       int threads) {
    int64_t step = 2, n;
    BY_UNIT(step = 2 * EDGE, );
    LowRankTerms terms = {h, B, kept, columns, h_row, r, k, (r + k + step - 1) / step * step};
    n = terms.width / 2; /* pairs */
    EACH_BLOCK(
        out, in, terms.width, pack_rows, in,
        if (n) pair_right(terms, c, room.left, room.right + p * n * PANEL),
        if (n) join_left(terms, i, count, room.left),
        if (n) low_rank_block(room, room.right + p * n * PANEL, n, count, tiles);
        output_block(room, t + i, s + c, bias ? bias + c : 0, n > 0, count, out, y + i * out + c))
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
                               int64_t k, float *total, number *dx, int tiles, int threads) {
    EACH_BLOCK(d, out, 0, pack_columns, d, , ,
               gradient_block(room, u + i, g + c, columns + i * k, kept, c, partial ? partial + i * d + c : 0, k,
                              count, d, total ? total + i * d + c : 0, dx ? dx + i * d + c : 0))
}
#else
int has_int8_matmuls(void) { return 0; }
#endif
