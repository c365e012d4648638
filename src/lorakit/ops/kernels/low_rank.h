/* Matmuls with low-rank factors, with dropout of the wide operand. The wide operand is read or written once. Threads
 * share the rows in units of whole blocks of the dropout's random stream where possible, so that no block is drawn
 * twice; a unit is computed a few rows at a time, so that its copy stays in the first cache. */

#ifdef DOTS
#define FEW_ROWS 16
#define MOST_UNIT 128            /* rows */
#define UNIT_ELEMENTS (1 << 17) /* number of elements of the wide operand that fit in the second cache */

typedef struct {
    int64_t rows, width, r, r_padded, unit; /* `unit` is the number of rows that a thread computes at a time */
    double p, each;
    uint64_t seed;
} LowRank;

static LowRank low_rank_of(int64_t rows, int64_t width, int64_t r, double p, uint64_t seed) {
    int64_t unit = BLOCK;
    while (unit > FEW_ROWS && unit / 2 * width % BLOCK == 0) unit /= 2;
    if (unit > MOST_UNIT) unit = MOST_UNIT;
    while (unit < MOST_UNIT / 2 && unit * width < UNIT_ELEMENTS) unit *= 2;
    return (LowRank){rows, width, r, padded(r, VECTOR), unit, p, p > 0 ? 1.0 / log1p(-p) : 0.0, seed};
}

#define WORDS(s) ((s).unit * (s).width / VECTOR) /* 16-bit words of a unit's mask */

/* sets a bit for each element of the `rows` rows from `first` that is kept */
static void draw_kept(LowRank s, int64_t first, int64_t rows, uint16_t *kept) {
    int64_t from = first * s.width, to = from + rows * s.width;
    memset(kept, 0xff, (size_t)(rows * s.width / 8));
    if (s.p <= 0) return;
    for (int64_t b = from / BLOCK; b * BLOCK < to; b++) {
        int64_t n = shorter(BLOCK, to - b * BLOCK), before = b * BLOCK - from;
        EACH_DROPPED(b, n, s.p, s.each, s.seed, {
            int64_t at = before + place;
            if (at >= 0) kept[at >> 4] &= (uint16_t)~(1u << (at & 15));
        });
    }
}

static inline __m256i kept_of(const number *from, const uint16_t *kept, int64_t at) {
    return _mm256_maskz_loadu_epi16(kept[at / VECTOR], from + at);
}

/* copies rows of width r to rows of width r_padded, with zeros after r and in the rows up to `filled` */
static void pad_rows(const number *from, LowRank s, int64_t rows, int64_t filled, number *to) {
    for (int64_t i = 0; i < filled; i++, to += s.r_padded) {
        memset(to, 0, (size_t)s.r_padded * sizeof(number));
        if (i < rows) memcpy(to, from + i * s.r, (size_t)s.r * sizeof(number));
    }
}

#define EACH_UNIT                                                        \
    _Pragma("omp for schedule(static)") for (int64_t first = 0; first < s.rows; first += s.unit)

/* allocates two buffers at once: a packed factor, and the buffers of every thread, which begin on a cache line */
static float *shared_room(size_t packed, size_t own, int threads, int *status) {
    return scratch(padded((int64_t)packed, VECTOR) + (size_t)threads * own + VECTOR, status);
}

static inline float *aligned(float *base) { return (float *)(((uintptr_t)base + 63) / 64 * 64); }

int shrink(const number *x, const number *a, int64_t rows, int64_t width, int64_t r, double p, uint64_t seed, number *h,
           int threads) {
    LowRank s = low_rank_of(rows, width, r, p, seed);
    int status = DONE;
    int64_t packed = padded(width / 2 * s.r_padded, VECTOR);
    int64_t words = padded(WORDS(s) / 2 + 1, VECTOR), copy = FEW_ROWS * width / 2, own = words + copy + FEW_ROWS * s.r_padded;
    float *base = shared_room((size_t)packed, (size_t)padded(own, VECTOR), threads, &status);
    if (!base) return status;
    pair *factor = (pair *)aligned(base);
    transpose_pairs(a, width, r, width / 2, factor, s.r_padded);
#pragma omp parallel num_threads(threads)
    {
        float *mine = (float *)factor + packed + THREAD * padded(own, VECTOR);
        uint16_t *kept = (uint16_t *)mine;
        number *dropped = (number *)(mine + words);
        float *sums = mine + words + copy;
        EACH_UNIT {
            int64_t count = shorter(s.unit, rows - first);
            draw_kept(s, first, count, kept);
            for (int64_t i = 0; i < count; i += FEW_ROWS) {
                int64_t few = shorter(FEW_ROWS, count - i);
                const number *from = x + (first + i) * width;
                for (int64_t j = 0; j < few * width; j += VECTOR)
                    _mm256_storeu_si256((__m256i *)(dropped + j), kept_of(from, kept + i * width / VECTOR, j));
                dots((pair *)dropped, width / 2, factor, s.r_padded, width / 2, sums, s.r_padded, padded(few, TILE),
                     s.r_padded, 0);
                for (int64_t row = 0; row < few; row++)
                    for (int64_t k = 0; k < r; k++) h[(first + i + row) * r + k] = narrow(sums[row * s.r_padded + k]);
            }
        }
    }
    free(base);
    return status;
}

int add_low_rank(const number *h, const number *a, int64_t rows, int64_t width, int64_t r, double p, uint64_t seed,
                 number *y, int threads) {
    LowRank s = low_rank_of(rows, width, r, p, seed);
    int status = DONE;
    int64_t half = s.r_padded / 2, packed = padded(half * width, VECTOR), words = padded(WORDS(s) / 2 + 1, VECTOR);
    int64_t left = FEW_ROWS * half, own = padded(words + left + FEW_ROWS * width, VECTOR);
    float *base = shared_room((size_t)packed, (size_t)own, threads, &status);
    if (!base) return status;
    pair *factor = (pair *)aligned(base);
    pair_rows(a, width, r, width, factor, width, half);
#pragma omp parallel num_threads(threads)
    {
        float *mine = (float *)factor + packed + THREAD * own;
        uint16_t *kept = (uint16_t *)mine;
        number *few_h = (number *)(mine + words);
        float *sums = mine + words + left;
        EACH_UNIT {
            int64_t count = shorter(s.unit, rows - first);
            draw_kept(s, first, count, kept);
            for (int64_t i = 0; i < count; i += FEW_ROWS) {
                int64_t few = shorter(FEW_ROWS, count - i);
                number *to = y + (first + i) * width;
                pad_rows(h + (first + i) * r, s, few, padded(few, TILE), few_h);
                dots((pair *)few_h, half, factor, width, half, sums, width, padded(few, TILE), width, 0);
                const uint16_t *mask = kept + i * width / VECTOR;
                for (int64_t j = 0; j < few * width; j += VECTOR) {
                    __m256i *at = (__m256i *)(to + j);
                    __m512 old = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(at)), 16));
                    __m512 all = _mm512_mask_add_ps(old, mask[j / VECTOR], old, _mm512_loadu_ps(sums + j));
                    _mm256_storeu_si256(at, narrow_vector(all));
                }
            }
        }
    }
    free(base);
    return status;
}

int outer(const number *dh, const number *x, int64_t rows, int64_t width, int64_t r, double p, uint64_t seed, float *grad,
          int threads) {
    LowRank s = low_rank_of(rows, width, r, p, seed);
    int status = DONE;
    int64_t all = s.r_padded * width, words = padded(WORDS(s) / 2 + 1, VECTOR), half = s.unit / 2;
    int64_t across = padded(half, VECTOR), parts[] = {words, half * width, s.unit * s.r_padded / 2, half * s.r_padded,
                                                      s.r_padded * across};
    int64_t own = all;
    for (int i = 0; i < 5; i++) own += parts[i] = padded(parts[i], VECTOR);
    float *base = shared_room(0, (size_t)own, threads, &status);
    if (!base) return status;
    float *first_of_all = aligned(base);
    for (int t = 0; t < threads; t++) memset(first_of_all + t * own, 0, (size_t)all * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        float *sums = first_of_all + THREAD * own;
        uint16_t *kept = (uint16_t *)(sums + all);
        pair *wide_pairs = (pair *)(sums + all + parts[0]), *narrow_rows = wide_pairs + parts[1];
        pair *narrow_pairs = narrow_rows + parts[2], *left = narrow_pairs + parts[3];
        EACH_UNIT {
            int64_t count = shorter(s.unit, rows - first), filled = padded(count, 2);
            draw_kept(s, first, count, kept);
            for (int64_t i = 0; i < count; i += 2) {
                const number *even = x + (first + i) * width, *odd = even + width;
                const uint16_t *mask = kept + i * width / VECTOR;
                int is_last = i + 1 == count;
                for (int64_t j = 0; j < width; j += VECTOR) {
                    __m256i b = is_last ? _mm256_setzero_si256() : kept_of(odd, mask + width / VECTOR, j);
                    _mm512_storeu_si512(wide_pairs + i / 2 * width + j, paired(kept_of(even, mask, j), b));
                }
            }
            pad_rows(dh + first * r, s, count, filled, (number *)narrow_rows);
            pair_rows((number *)narrow_rows, s.r_padded, filled, s.r_padded, narrow_pairs, s.r_padded, filled / 2);
            transpose_pairs((number *)narrow_pairs, 2 * s.r_padded, filled / 2, s.r_padded, left, across);
            dots(left, across, wide_pairs, width, filled / 2, sums, width, s.r_padded, width, 1);
        }
    }
    memcpy(grad, first_of_all, (size_t)(r * width) * sizeof(float));
    for (int t = 1; t < threads; t++) {
        const float *more = first_of_all + t * own;
#pragma omp simd
        for (int64_t j = 0; j < r * width; j++) grad[j] += more[j];
    }
    free(base);
    return status;
}
#endif
