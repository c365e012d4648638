/* A decoder layer for few new tokens per row, without gradients: the functions above, one after the other. Its bits are
 * those of separate calls. All fields have 8 bytes; decoder_layer.py fills them in this order. */

#define MOST_LOW_RANKS 4

typedef struct { /* factors of one rank, with one adapter per row; see add_per_row */
    const number *A, *Bt;
    const int64_t *index;
    int64_t r;
} StackedLow;

typedef struct { /* a linear layer, or an absent one if W is null */
    const number *W, *bias;
    int64_t W_row, in, out, count; /* count: number of `low` that are used */
    StackedLow low[MOST_LOW_RANKS];
} Site;

enum { Q, K, V, O, FIRST, UP, DOWN, SITES };
enum { BEFORE_ATTENTION, AFTER_ATTENTION, BEFORE_FEED_FORWARD, AFTER_FEED_FORWARD, OF_Q, OF_K, NORMS };

typedef struct {
    Site sites[SITES];
    const number *norms[NORMS]; /* null if absent */
    int64_t heads, kv, width, act;
    const number *cos, *sin; /* null without rotary positions */
    int64_t table_rows, rot;
    number *keys, *values;
    const int64_t *write, *table, *lengths; /* write: slot of each new token */
    int64_t longest;
} DecoderLayer;

/* the number of threads for `count` elements, as in gateway.py */
static inline int threads_for(int64_t count, int threads) { return count > (1 << 14) ? threads : 1; }

static int site(const Site *s, const number *x, int64_t tokens, int64_t rows, number *y, int threads) {
    int status = linear_few_rows(x, s->W, s->bias, s->W_row, rows, s->in, s->out, y,
                                 threads_for(s->in * s->out, threads));
    for (int64_t i = 0; i < s->count && !status; i++) {
        StackedLow low = s->low[i];
        status = add_per_row(x, low.A, low.Bt, low.index, tokens, rows, s->in, low.r, s->out, y,
                             threads_for(rows * low.r * s->in, threads));
    }
    return status;
}

/* the norm of x in `room`, or x if the norm is absent */
static const number *normed(const DecoderLayer *s, const float *numbers, int which, const number *x, int64_t rows,
                            int64_t d, number *room, float *rstd, int threads) {
    if (!s->norms[which]) return x;
    rms_forward(x, s->norms[which], numbers[2 * which], numbers[2 * which + 1], rows, d, room, rstd,
                threads_for(rows * d, threads));
    return room;
}

static void add_rows(const number *a, const number *b, int64_t count, number *y) {
#pragma omp simd
    for (int64_t j = 0; j < count; j++) y[j] = narrow(wide(a[j]) + wide(b[j]));
}

#define TRY(call)              \
    if ((status = call)) {     \
        free(base);            \
        return status;         \
    }

/* numbers: eps and offset of each norm, and the scale of the scores */
int decoder_layer(const DecoderLayer *s, const float *numbers, const number *x, int64_t rows, int64_t tokens, number *y,
                  int threads) {
    int status = DONE;
    const Site *sites = s->sites;
    int64_t n = rows * tokens, d = sites[Q].in, of_q = sites[Q].out, of_k = sites[K].out, inner = sites[FIRST].out;
    float *base = scratch((size_t)(n * (2 * d + 2 * of_q + 2 * of_k + 2 * inner + s->heads + s->kv + 1)), &status);
    if (!base) return status;
    float *rstd = base;
    number *normal = (number *)(rstd + n * (s->heads + s->kv + 1)), *after = normal + n * d, *q = after + n * d;
    number *k = q + n * of_q, *v = k + n * of_k, *mixed = v + n * of_k, *first = mixed + n * of_q;
    number *up = first + n * inner;

    const number *read = normed(s, numbers, BEFORE_ATTENTION, x, n, d, normal, rstd, threads);
    TRY(site(sites + Q, read, tokens, n, q, threads))
    TRY(site(sites + K, read, tokens, n, k, threads))
    TRY(site(sites + V, read, tokens, n, v, threads))
    normed(s, numbers, OF_Q, q, n * s->heads, s->width, q, rstd, threads);
    normed(s, numbers, OF_K, k, n * s->kv, s->width, k, rstd, threads);
    if (s->cos) {
        rotate(q, of_q, s->cos, s->sin, s->table_rows, n, s->heads, s->width, s->rot, 0, q, of_q,
               threads_for(n * of_q, threads));
        rotate(k, of_k, s->cos, s->sin, s->table_rows, n, s->kv, s->width, s->rot, 0, k, of_k,
               threads_for(n * of_k, threads));
    }
    for (int64_t i = 0; i < n; i++) {
        memcpy(s->keys + s->write[i] * of_k, k + i * of_k, (size_t)of_k * sizeof(number));
        memcpy(s->values + s->write[i] * of_k, v + i * of_k, (size_t)of_k * sizeof(number));
    }
    TRY(attend_slots(q, s->keys, s->values, s->table, s->lengths, rows, tokens, s->longest, s->kv, s->heads / s->kv,
                     s->width, numbers[2 * NORMS], mixed, threads_for(n * of_q * s->longest, threads)))
    TRY(site(sites + O, mixed, tokens, n, after, threads))
    add_rows(x, normed(s, numbers, AFTER_ATTENTION, after, n, d, normal, rstd, threads), n * d, y);

    read = normed(s, numbers, BEFORE_FEED_FORWARD, y, n, d, normal, rstd, threads);
    TRY(site(sites + FIRST, read, tokens, n, first, threads))
    if (sites[UP].W) TRY(site(sites + UP, read, tokens, n, up, threads))
    gate((int)s->act, first, sites[UP].W ? up : 0, n * inner, first, threads_for(n * inner, threads));
    TRY(site(sites + DOWN, first, tokens, n, after, threads))
    add_rows(y, normed(s, numbers, AFTER_FEED_FORWARD, after, n, d, normal, rstd, threads), n * d, y);
    free(base);
    return status;
}
