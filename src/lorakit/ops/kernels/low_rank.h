/* The low-rank matmuls of a backward pass that read the gradient dy of an output, in one pass. The tokens are divided
 * into parts, whose number depends on the number of tokens alone. A thread multiplies some rows of a part with a narrow
 * matrix, and then adds up the gradient of B over these rows while they are in its cache. The sums of the parts are
 * added in a fixed order, so the number of threads changes no bit. With tile registers if there are any, otherwise with
 * dot-product instructions. */

#ifdef DOTS
#define FEW_ROWS 32              /* rows that are multiplied together: two tiles; `out` is a multiple of it too */
#define CACHED_ROWS 128          /* rows that a thread uses twice, a multiple of FEW_ROWS */
#define MOST_PARTS 8
#define ACROSS 4                 /* tiles of VECTOR columns of dy that are multiplied together */
#define SQUARE (VECTOR * VECTOR) /* pairs, or fp32 values, in a tile */

typedef struct {
    const number *dy, *h;
    number *dh;
    float *kept;
    int64_t h_row, rows, out, r, k;
    int64_t parts, part, r_tiles, width; /* rows of a part; tiles of VECTOR for r; columns of the narrow matrix */
} LowRank;

typedef struct { /* one thread's buffers */
    float *base;
    number *last; /* the last rows, followed by zeros */
    pair *h, *dy; /* tiles of hᵀ, and of ACROSS·VECTOR columns of dy, for CACHED_ROWS rows */
    float *sums;
} LowRankRoom;

static int make_low_rank_room(LowRankRoom *room, LowRank s, int *status) {
    int64_t last = FEW_ROWS * s.out / 2, h = CACHED_ROWS / 2 * s.r_tiles * VECTOR;
    int64_t dy = CACHED_ROWS / 2 * ACROSS * VECTOR;
    room->base = scratch((size_t)(last + h + dy + FEW_ROWS * s.width + VECTOR), status);
    if (!room->base) return 0;
    float *at = (float *)(((uintptr_t)room->base + 63) / 64 * 64);
    room->last = (number *)at, at += last;
    room->h = (pair *)at, at += h;
    room->dy = (pair *)at, at += dy;
    room->sums = at;
    return 1;
}

static inline __mmask16 first_lanes(int64_t count) {
    return count >= VECTOR ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* pairs up rows [begin, begin + FEW_ROWS) of `from` (·, columns), with zeros up to a multiple of VECTOR columns */
static void pair_narrow(const number *from, int64_t columns, int64_t begin, pair *to, int64_t to_row) {
    for (int64_t i = begin; i < begin + FEW_ROWS; i += 2)
        for (int64_t j = 0; j < columns; j += VECTOR) {
            __mmask16 held = first_lanes(columns - j);
            const number *at = from + i * columns + j;
            __m256i even = _mm256_maskz_loadu_epi16(held, at), odd = _mm256_maskz_loadu_epi16(held, at + columns);
            _mm512_storeu_si512(to + i / 2 * to_row + j, paired(even, odd));
        }
}

/* arranges `count` rows of h as tiles of hᵀ: for every FEW_ROWS rows and VECTOR columns, zero where there are none */
static void transpose_h(LowRank s, const number *h, int64_t count, pair *to) {
    pair by_row[SQUARE];
    for (int64_t t = 0; t < count; t += FEW_ROWS)
        for (int64_t j = 0; j < s.r; j += VECTOR, to += SQUARE) {
            for (int64_t i = 0; i < VECTOR; i++) {
                int64_t row = t + 2 * i;
                const number *at = h + row * s.h_row + j;
                __mmask16 held = first_lanes(s.r - j);
                __m256i even = _mm256_maskz_loadu_epi16(row < count ? held : 0, at);
                __m256i odd = _mm256_maskz_loadu_epi16(row + 1 < count ? held : 0, at + s.h_row);
                _mm512_storeu_si512(by_row + i * VECTOR, paired(even, odd));
            }
            transpose_tile((const int8_t *)by_row, VECTOR * 4, _mm512_setzero_si512(), (int8_t *)to);
        }
}

/* sums (FEW_ROWS, width) = dy·right */
static void multiply_narrow(LowRank s, const number *dy, const pair *right, float *sums) {
    const pair *left = (const pair *)dy;
    int64_t n = s.out / 2, w = s.width;
#ifdef TILES
    for (int64_t j = 0; permitted && j < w; j += 2 * VECTOR) {
        if (w - j > VECTOR)
            dots_block(left, n, right + j, w, n, sums + j, w, 0, 2, 2);
        else
            dots_block(left, n, right + j, w, n, sums + j, w, 0, 2, 1);
    }
    if (permitted) return;
#endif
    dots_by_vectors(left, n, right, w, n, sums, w, FEW_ROWS, w, 0);
}

/* writes `count` rows of dy·B to dh, and of dy·W_K to `kept` */
static void write_narrow(LowRank s, const float *sums, int64_t at, int64_t count) {
    int64_t beyond = s.dh ? s.r_tiles * VECTOR : 0;
    for (int64_t i = 0; i < count; i++, sums += s.width) {
        for (int64_t j = 0; s.dh && j < s.r; j += VECTOR)
            _mm256_mask_storeu_epi16(s.dh + (at + i) * s.r + j, first_lanes(s.r - j),
                                     narrow_vector(_mm512_loadu_ps(sums + j)));
        for (int64_t j = 0; j < s.k; j += VECTOR)
            _mm512_mask_storeu_ps(s.kept + (at + i) * s.k + j, first_lanes(s.k - j), _mm512_loadu_ps(sums + beyond + j));
    }
}

/* pairs up FEW_ROWS rows of two tiles of columns; lane l of tile t is column 8·(l / 4) + 4·t + l % 4 */
static inline void pair_wide(const number *dy, int64_t row, pair *to) {
    for (int64_t i = 0; i < VECTOR; i++) {
        __m512i even = _mm512_loadu_si512(dy + 2 * i * row), odd = _mm512_loadu_si512(dy + (2 * i + 1) * row);
        _mm512_storeu_si512(to + i * VECTOR, _mm512_unpacklo_epi16(even, odd));
        _mm512_storeu_si512(to + SQUARE + i * VECTOR, _mm512_unpackhi_epi16(even, odd));
    }
}

/* adds hᵀ·dy over `count` rows to `sums` (across, r_tiles, VECTOR, VECTOR), or writes it there if `first` */
static inline __attribute__((always_inline)) void add_outer(LowRank s, const number *dy, int64_t count, int first,
                                                            LowRankRoom room, float *sums, const int across) {
    int64_t apart = s.r_tiles * SQUARE;
    for (int64_t j = 0; j < s.r_tiles; j++, sums += SQUARE) {
        const pair *h = room.h + j * SQUARE;
#ifdef TILES
        if (permitted && first) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else if (permitted) {
            _tile_loadd(0, sums, 64);
            _tile_loadd(1, sums + apart, 64);
            if (across == 4) _tile_loadd(2, sums + 2 * apart, 64);
            if (across == 4) _tile_loadd(3, sums + 3 * apart, 64);
        }
#endif
        for (int64_t t = 0; t < count; t += FEW_ROWS, h += apart) {
            pair *right = room.dy + t / FEW_ROWS * ACROSS * SQUARE;
            for (int c = 0; j == 0 && c < across; c += 2)
                pair_wide(dy + t * s.out + c * VECTOR, s.out, right + c * SQUARE);
#ifdef TILES
            if (permitted) {
                _tile_loadd(4, h, 64);
                _tile_loadd(5, right, 64);
                _tile_dpbf16ps(0, 4, 5);
                _tile_loadd(6, right + SQUARE, 64);
                _tile_dpbf16ps(1, 4, 6);
                if (across == 4) {
                    _tile_loadd(5, right + 2 * SQUARE, 64);
                    _tile_dpbf16ps(2, 4, 5);
                    _tile_loadd(6, right + 3 * SQUARE, 64);
                    _tile_dpbf16ps(3, 4, 6);
                }
                continue;
            }
#endif
            int64_t held = padded(shorter(VECTOR, s.r - j * VECTOR), TILE); /* the other rows are not used */
            for (int c = 0; c < across; c++)
                dots_by_vectors(h, VECTOR, right + c * SQUARE, VECTOR, VECTOR, sums + c * apart, VECTOR, held, VECTOR,
                                !first || t > 0);
        }
#ifdef TILES
        if (permitted) {
            _tile_stored(0, sums, 64);
            _tile_stored(1, sums + apart, 64);
            if (across == 4) _tile_stored(2, sums + 2 * apart, 64);
            if (across == 4) _tile_stored(3, sums + 3 * apart, 64);
        }
#endif
    }
}

/* adds up hᵀ·dy over `count` rows from row `at` on, which are at `dy`, followed by zeros up to FEW_ROWS */
static void add_gradient(LowRank s, const number *dy, int64_t at, int64_t count, int first, LowRankRoom room,
                         float *sums) {
    transpose_h(s, s.h + at * s.h_row, count, room.h);
    for (int64_t c = 0; c < s.out; c += ACROSS * VECTOR) {
        float *to = sums + c * s.r_tiles * VECTOR;
        if (s.out - c >= ACROSS * VECTOR)
            add_outer(s, dy + c, count, first, room, to, ACROSS);
        else
            add_outer(s, dy + c, count, first, room, to, 2);
    }
}

/* computes rows [begin, stop) of dy·right, and the sums (out / VECTOR, r_tiles, VECTOR, VECTOR) of hᵀ·dy over them */
static void low_rank_part(LowRank s, int64_t begin, int64_t stop, const pair *right, LowRankRoom room, float *sums) {
    for (int64_t at = begin; at < stop; at += CACHED_ROWS) {
        int64_t count = shorter(CACHED_ROWS, stop - at), whole = count / FEW_ROWS * FEW_ROWS, rest = count - whole;
        const number *dy = s.dy + at * s.out;
        size_t bytes = (size_t)(rest * s.out) * sizeof(number);
        if (rest) {
            memcpy(room.last, dy + whole * s.out, bytes);
            memset((char *)room.last + bytes, 0, (size_t)(FEW_ROWS * s.out) * sizeof(number) - bytes);
        }
        for (int64_t i = 0; s.width && i < count; i += FEW_ROWS) {
            multiply_narrow(s, i < whole ? dy + i * s.out : room.last, right, room.sums);
            write_narrow(s, room.sums, at + i, shorter(FEW_ROWS, count - i));
        }
        if (s.h && whole) add_gradient(s, dy, at, whole, at == begin, room, sums);
        if (s.h && rest) add_gradient(s, room.last, at + whole, rest, at + whole == begin, room, sums);
    }
}

/* adds up the parts' sums for 2·VECTOR columns of dy, and writes them as rows of grad (out, r) */
static void add_parts(LowRank s, const float *sums, int64_t c, float *grad) {
    float total[SQUARE], by_column[SQUARE];
    int64_t apart = s.out * s.r_tiles * VECTOR;
    for (int64_t t = 0; t < 2; t++)
        for (int64_t j = 0; j < s.r_tiles; j++) {
            const float *from = sums + ((c / VECTOR + t) * s.r_tiles + j) * SQUARE;
            for (int64_t i = 0; i < SQUARE; i += VECTOR) {
                __m512 v = _mm512_loadu_ps(from + i);
                for (int64_t p = 1; p < s.parts; p++) v = _mm512_add_ps(v, _mm512_loadu_ps(from + p * apart + i));
                _mm512_storeu_ps(total + i, v);
            }
            transpose_tile((const int8_t *)total, VECTOR * 4, _mm512_setzero_si512(), (int8_t *)by_column);
            for (int64_t l = 0; l < VECTOR; l++)
                _mm512_mask_storeu_ps(grad + (c + 8 * (l / 4) + 4 * t + l % 4) * s.r + j * VECTOR,
                                      first_lanes(s.r - j * VECTOR), _mm512_loadu_ps(by_column + l * VECTOR));
        }
}

int low_rank_gradients(const number *dy, const number *B, const number *columns, const number *h, int64_t h_row,
                       int64_t rows, int64_t out, int64_t r, int64_t k, number *dh, float *kept, float *grad,
                       int threads) {
    LowRank s = {dy, h, dh, kept, h_row, rows, out, r, k, 0, 0, padded(r, VECTOR) / VECTOR, 0};
    int64_t beyond = dh ? s.r_tiles * VECTOR : 0;
    s.width = beyond + padded(k, VECTOR);
    s.parts = shorter(MOST_PARTS, (rows + CACHED_ROWS - 1) / CACHED_ROWS);
    s.part = padded((rows + s.parts - 1) / s.parts, FEW_ROWS), s.parts = (rows + s.part - 1) / s.part;
    int64_t narrow_size = out / 2 * s.width, sums_size = h ? out * s.r_tiles * VECTOR : 0;
    int status = DONE;
    float *base = scratch((size_t)(narrow_size + s.parts * sums_size + VECTOR), &status);
    if (!base) return status;
    pair *right = (pair *)(((uintptr_t)base + 63) / 64 * 64);
    float *sums = (float *)(right + narrow_size);
#pragma omp parallel num_threads(threads)
    {
        LowRankRoom room;
        int ready = make_low_rank_room(&room, s, &status);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < out; i += FEW_ROWS) {
            if (dh) pair_narrow(B, r, i, right, s.width);
            if (k) pair_narrow(columns, k, i, right + beyond, s.width);
        }
#ifdef TILES
        Tiles outside = {0};
        if (permitted) outside = begin_tiles();
#endif
#pragma omp for schedule(static)
        for (int64_t p = 0; p < s.parts; p++)
            if (ready) low_rank_part(s, p * s.part, shorter((p + 1) * s.part, rows), right, room, sums + p * sums_size);
#ifdef TILES
        if (permitted) end_tiles(outside);
#endif
#pragma omp for schedule(static)
        for (int64_t c = 0; c < (h ? out : 0); c += 2 * VECTOR)
            if (ready) add_parts(s, sums, c, grad);
        free(room.base);
    }
    free(base);
    return status;
}
#endif
