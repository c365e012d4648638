/* Matmuls of rows with per-row low-rank factors. Each factor is read once, from beginning to end. Memory is prefetched
 * two pages ahead of the current position, because hardware prefetching stops at the end of a page. */

#define AHEAD 8192 /* bytes */

static inline void prefetch(const number *from, int64_t n) {
#ifdef __GNUC__
    uintptr_t at = (uintptr_t)from + AHEAD;
    for (int64_t byte = 0; byte < n * (int64_t)sizeof(number); byte += 64) __builtin_prefetch((const void *)(at + byte), 0, 2);
#endif
}

static inline void shrink_row(const float *x, const number *a, int64_t n, int64_t r, float *h) {
    for (int64_t k = 0; k < r; k++, a += n) {
        prefetch(a, n);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; j++) sum += x[j] * wide(a[j]);
        h[k] = wide(narrow(sum));
    }
}

static inline void expand_row(const float *h, const number *b, int64_t n, int64_t r, float *y) {
    for (int64_t k = 0; k < r; k++, b += n) {
        prefetch(b, n);
        float by = h[k];
#pragma omp simd
        for (int64_t j = 0; j < n; j++) y[j] += by * wide(b[j]);
    }
}

int add_per_row(const number *x, const number *A, const number *Bt, const int64_t *index, int64_t tokens, int64_t rows,
            int64_t in, int64_t r, int64_t out, number *y, int threads) {
    int64_t widest = in > out ? in : out;
    if (threads > rows) threads = (int)rows;
    int status = DONE;
#pragma omp parallel num_threads(threads)
    {
        float *e = scratch((size_t)(widest + r), &status);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            int64_t own = index[i / tokens];
            if (own < 0 || !e) continue;
            float *h = e + widest;
            upcast_row(x + i * in, 1.0f, in, e);
            shrink_row(e, A + own * r * in, in, r, h);
            upcast_row(y + i * out, 1.0f, out, e);
            expand_row(h, Bt + own * r * out, out, r, e);
            scale_row(e, 1.0f, out, y + i * out);
        }
        free(e);
    }
    return status;
}
