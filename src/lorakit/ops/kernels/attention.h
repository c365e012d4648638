/* Attention over separate sequences, without a tensor of all scores. Each thread computes the heads of q that share a
 * head of k, for one sequence and BAND queries at a time; their rows are stacked in one matmul. The backward pass
 * computes the weights again. Weights and their gradients are rounded to bf16 before they are multiplied. */

#ifdef DOTS
#define BAND 32 /* queries at a time: few, so that little is computed of what a causal mask hides */

typedef struct { /* heads of one sequence, and the distances between batch rows, heads and tokens */
    number *at;
    int64_t batch, head, token;
} Heads;

typedef struct {
    const int64_t *ends; /* of each sequence in a row of tokens */
    int64_t batch, sequences, kv, group, width;
    float scale;
    int causal;
} Sizes;

typedef struct { /* one thread's buffers; `keys` is the longest sequence, padded, and `rows` the most stacked rows */
    int64_t keys, rows;
    float *base, *scores, *grads, *sums, *dk, *dv;
    pair *k, *v, *by_key, *q, *dy, *q_across, *dy_across, *weights, *dscores, *dscores_by_row;
} Room;

static int make_room(Room *room, Sizes s, int *status) {
    int64_t longest = 0;
    for (int64_t i = 0, begin = 0; i < s.sequences; begin = s.ends[i++])
        if (s.ends[i] - begin > longest) longest = s.ends[i] - begin;
    int64_t keys = room->keys = padded(longest, VECTOR), rows = room->rows = s.group * BAND, d = s.width;
    int64_t sizes[] = {rows * keys, rows * keys, rows * d, d * keys, d * keys, d * keys / 2, d * keys / 2, d * keys / 2,
                       rows * d / 2, rows * d / 2, rows * d / 2, rows * d / 2, rows * keys / 2, rows * keys / 2,
                       rows * keys / 2};
    void *parts[15];
    int64_t total = VECTOR;
    for (int i = 0; i < 15; i++) total += sizes[i] = padded(sizes[i], VECTOR);
    room->base = scratch((size_t)total, status);
    if (!room->base) return 0;
    float *at = (float *)(((uintptr_t)room->base + 63) / 64 * 64);
    for (int i = 0; i < 15; at += sizes[i++]) parts[i] = at;
    room->scores = parts[0], room->grads = parts[1], room->sums = parts[2], room->dk = parts[3], room->dv = parts[4];
    room->k = parts[5], room->v = parts[6], room->by_key = parts[7], room->q = parts[8], room->dy = parts[9];
    room->q_across = parts[10], room->dy_across = parts[11], room->weights = parts[12], room->dscores = parts[13];
    room->dscores_by_row = parts[14];
    return 1;
}

/* copies queries [begin, stop) of a group of heads, `each` rows per head; rows beyond are zero */
static void stack(const number *from, Heads h, Sizes s, int64_t begin, int64_t stop, int64_t each, number *to) {
    for (int64_t g = 0; g < s.group; g++)
        for (int64_t i = 0; i < each; i++, to += s.width) {
            if (begin + i < stop)
                memcpy(to, from + g * h.head + (begin + i) * h.token, (size_t)s.width * sizeof(number));
            else
                memset(to, 0, (size_t)s.width * sizeof(number));
        }
}

/* writes sums·factor to the queries [begin, stop) of a group of heads */
static void unstack(const float *sums, const float *factors, float factor, Heads h, Sizes s, int64_t begin, int64_t stop,
                    int64_t each, number *to) {
    for (int64_t g = 0; g < s.group; g++)
        for (int64_t i = 0; begin + i < stop; i++) {
            int64_t row = g * each + i;
            __m512 by = _mm512_set1_ps(factors ? factors[row] : factor);
            number *out = to + g * h.head + (begin + i) * h.token;
            for (int64_t j = 0; j < s.width; j += VECTOR)
                _mm256_storeu_si256((__m256i *)(out + j),
                                    narrow_vector(_mm512_mul_ps(_mm512_loadu_ps(sums + row * s.width + j), by)));
        }
}

/* replaces a row of scores with powers, and returns their sum; positions from `seen` to `filled` get zero */
static inline float powers_of_scores(float *row, int64_t seen, int64_t filled, float scale) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < seen; j++) {
        row[j] *= scale;
        most = row[j] > most ? row[j] : most;
    }
    for (int64_t j = seen; j < filled; j++) row[j] = most + 2 * LEAST;
    return powers_row(row, filled, most);
}

static inline int64_t seen_by(Sizes s, int64_t query, int64_t stop, int64_t keys) {
    int64_t last = shorter(query, stop - 1); /* padding sees what the last query sees */
    return s.causal ? last + 1 : keys;
}

static void attend_sequence(Heads q, Heads k, Heads v, Heads out, Sizes s, int64_t keys, Room room) {
    int64_t across = padded(keys, VECTOR), d = s.width;
    transpose_pairs(k.at, k.token, keys, d / 2, room.k, across);
    pair_rows(v.at, v.token, keys, d, room.v, d, across / 2);
    float *shares = room.grads;
    for (int64_t begin = 0; begin < keys; begin += BAND) {
        int64_t stop = shorter(begin + BAND, keys), each = padded(stop - begin, TILE), rows = s.group * each;
        int64_t filled = s.causal ? padded(stop, VECTOR) : across;
        stack(q.at, q, s, begin, stop, each, (number *)room.q);
        dots(room.q, d / 2, room.k, across, d / 2, room.scores, across, rows, filled, 0);
        number *weights = (number *)room.weights;
        for (int64_t i = 0; i < rows; i++) {
            float *row = room.scores + i * across;
            shares[i] = 1.0f / powers_of_scores(row, seen_by(s, begin + i % each, stop, keys), filled, s.scale);
            for (int64_t j = 0; j < filled; j += VECTOR)
                _mm256_storeu_si256((__m256i *)(weights + i * across + j), narrow_vector(_mm512_loadu_ps(row + j)));
        }
        dots(room.weights, across / 2, room.v, d, filled / 2, room.sums, d, rows, d, 0);
        unstack(room.sums, shares, 0.0f, out, s, begin, stop, each, out.at);
    }
}

/* turns the scores and weight gradients of two rows into pairs of weights and of score gradients */
static void backward_rows(float *const *scores, float *const *grads, const int64_t *seen, int64_t filled, float scale,
                          pair *weights, pair *dscores, number *const *by_row) {
    __m512 shares[2], dots_of_rows[2];
    for (int r = 0; r < 2; r++) {
        float share = 1.0f / powers_of_scores(scores[r], seen[r], filled, scale), dot = 0.0f;
        const float *e = scores[r], *g = grads[r];
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < filled; j++) dot += e[j] * g[j];
        shares[r] = _mm512_set1_ps(share), dots_of_rows[r] = _mm512_set1_ps(dot * share);
    }
    for (int64_t j = 0; j < filled; j += VECTOR) {
        __m256i w[2], ds[2];
        for (int r = 0; r < 2; r++) {
            __m512 p = _mm512_mul_ps(_mm512_loadu_ps(scores[r] + j), shares[r]);
            w[r] = narrow_vector(p);
            ds[r] = narrow_vector(_mm512_mul_ps(p, _mm512_sub_ps(_mm512_loadu_ps(grads[r] + j), dots_of_rows[r])));
            _mm256_storeu_si256((__m256i *)(by_row[r] + j), ds[r]);
        }
        _mm512_storeu_si512(weights + j, paired(w[0], w[1]));
        _mm512_storeu_si512(dscores + j, paired(ds[0], ds[1]));
    }
}

/* writes the transpose of sums (width, across)·factor to tokens */
static void untranspose(const float *sums, int64_t across, float factor, Heads to, int64_t tokens, int64_t width) {
    __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i at = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)across));
    for (int64_t i = 0; i < tokens; i++)
        for (int64_t j = 0; j < width; j += VECTOR) {
            __m512 row = _mm512_i32gather_ps(at, sums + j * across + i, 4);
            _mm256_storeu_si256((__m256i *)(to.at + i * to.token + j),
                                narrow_vector(_mm512_mul_ps(row, _mm512_set1_ps(factor))));
        }
}

static void attend_backward_sequence(Heads q, Heads k, Heads v, Heads dy, Heads dq, Heads dk, Heads dv, Sizes s,
                                     int64_t keys, Room room) {
    int64_t across = padded(keys, VECTOR), d = s.width;
    transpose_pairs(k.at, k.token, keys, d / 2, room.k, across);
    transpose_pairs(v.at, v.token, keys, d / 2, room.v, across);
    pair_rows(k.at, k.token, keys, d, room.by_key, d, across / 2);
    memset(room.dk, 0, (size_t)(d * across) * sizeof(float));
    memset(room.dv, 0, (size_t)(d * across) * sizeof(float));
    for (int64_t begin = 0; begin < keys; begin += BAND) {
        int64_t stop = shorter(begin + BAND, keys), each = padded(stop - begin, TILE), rows = s.group * each;
        int64_t filled = s.causal ? padded(stop, VECTOR) : across, half = padded(rows / 2, VECTOR);
        stack(q.at, q, s, begin, stop, each, (number *)room.q);
        stack(dy.at, dy, s, begin, stop, each, (number *)room.dy);
        dots(room.q, d / 2, room.k, across, d / 2, room.scores, across, rows, filled, 0);
        dots(room.dy, d / 2, room.v, across, d / 2, room.grads, across, rows, filled, 0);
        for (int64_t i = 0; i < rows; i += 2) {
            float *scores[2] = {room.scores + i * across, room.scores + (i + 1) * across};
            float *grads[2] = {room.grads + i * across, room.grads + (i + 1) * across};
            int64_t query = begin + i % each;
            int64_t seen[2] = {seen_by(s, query, stop, keys), seen_by(s, query + 1, stop, keys)};
            number *by_row[2] = {(number *)room.dscores_by_row + i * across,
                                 (number *)room.dscores_by_row + (i + 1) * across};
            backward_rows(scores, grads, seen, filled, s.scale, room.weights + i / 2 * across,
                          room.dscores + i / 2 * across, by_row);
        }
        pair *twice = (pair *)room.sums; /* rows 2i and 2i + 1 as pairs, before they are transposed */
        pair_rows((number *)room.q, d, rows, d, twice, d, rows / 2);
        transpose_pairs((number *)twice, 2 * d, rows / 2, d, room.q_across, half);
        pair_rows((number *)room.dy, d, rows, d, twice, d, rows / 2);
        transpose_pairs((number *)twice, 2 * d, rows / 2, d, room.dy_across, half);
        dots(room.dy_across, half, room.weights, across, rows / 2, room.dv, across, d, filled, 1);
        dots(room.q_across, half, room.dscores, across, rows / 2, room.dk, across, d, filled, 1);
        dots(room.dscores_by_row, across / 2, room.by_key, d, filled / 2, room.sums, d, rows, d, 0);
        unstack(room.sums, 0, s.scale, dq, s, begin, stop, each, dq.at);
    }
    untranspose(room.dk, across, s.scale, dk, keys, d);
    untranspose(room.dv, across, 1.0f, dv, keys, d);
}

/* the heads of a task, which is a batch row, a sequence and a head of k; `shared` is the number of heads per head of k */
static Heads heads_of(Heads all, Sizes s, int64_t task, int64_t shared) {
    int64_t head = task % s.kv, sequence = task / s.kv % s.sequences, row = task / s.kv / s.sequences;
    int64_t begin = sequence ? s.ends[sequence - 1] : 0;
    all.at += row * all.batch + head * shared * all.head + begin * all.token;
    return all;
}

static int64_t length_of(Sizes s, int64_t task) {
    int64_t sequence = task / s.kv % s.sequences;
    return s.ends[sequence] - (sequence ? s.ends[sequence - 1] : 0);
}

#define EACH_TASK(call)                                                                            \
    int status = DONE;                                                                             \
    _Pragma("omp parallel num_threads(threads)") {                                                 \
        Room room;                                                                                 \
        int ready = make_room(&room, s, &status);                                                  \
        _Pragma("omp for schedule(dynamic)") for (int64_t t = 0; t < s.batch * s.sequences * s.kv; t++) \
            if (ready) call;                                                                       \
        if (ready) free(room.base);                                                                \
    }                                                                                              \
    return status

#define HEADS(name) number *name, int64_t name##_batch, int64_t name##_head, int64_t name##_token
#define GIVEN(name, heads) heads_of((Heads){name, name##_batch, name##_head, name##_token}, s, t, heads)

int attend(HEADS(q), HEADS(k), HEADS(v), HEADS(out), const int64_t *ends, int64_t batch, int64_t sequences, int64_t kv,
           int64_t group, int64_t width, float scale, int causal, int threads) {
    Sizes s = {ends, batch, sequences, kv, group, width, scale, causal};
    EACH_TASK(attend_sequence(GIVEN(q, group), GIVEN(k, 1), GIVEN(v, 1), GIVEN(out, group), s, length_of(s, t), room));
}

int attend_backward(HEADS(q), HEADS(k), HEADS(v), HEADS(dy), HEADS(dq), HEADS(dk), HEADS(dv), const int64_t *ends,
                    int64_t batch, int64_t sequences, int64_t kv, int64_t group, int64_t width, float scale, int causal,
                    int threads) {
    Sizes s = {ends, batch, sequences, kv, group, width, scale, causal};
    EACH_TASK(attend_backward_sequence(GIVEN(q, group), GIVEN(k, 1), GIVEN(v, 1), GIVEN(dy, group), GIVEN(dq, group),
                                       GIVEN(dk, 1), GIVEN(dv, 1), s, length_of(s, t), room));
}
#endif

/* returns whether this library has the functions that multiply with dot-product instructions */
int has_dots(void) {
#ifdef DOTS
    return 1;
#else
    return 0;
#endif
}
