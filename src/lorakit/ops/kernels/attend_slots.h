/* Attention of the last `tokens` tokens of each row to the keys and values of its own sequence, in place: position t of
 * row i is at slot table[i][t], for t < lengths[i]. A token sees the positions up to its own, and they are added in
 * their order. So its bits do not depend on other rows. */

static void attend_own(const number *q, const number *k, const number *v, const int64_t *slots, int64_t n,
                       int64_t token, int64_t group, int64_t d, float scale, float *room, int64_t padded_n,
                       number *out) {
    float *queries = room, *sums = queries + group * d, *scores = sums + group * d;
    for (int64_t j = 0; j < group * d; j++) queries[j] = wide(q[j]), sums[j] = 0.0f;
    for (int64_t t = 0; t < n; t++) {
        const number *key = k + slots[t] * token;
        for (int64_t g = 0; g < group; g++) {
            const float *query = queries + g * d;
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t j = 0; j < d; j++) dot += query[j] * wide(key[j]);
            scores[g * padded_n + t] = dot * scale;
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float *row = scores + g * padded_n, most = -INFINITY;
        int64_t filled = (n + WHOLE - 1) / WHOLE * WHOLE;
#pragma omp simd reduction(max : most)
        for (int64_t t = 0; t < n; t++) most = row[t] > most ? row[t] : most;
        for (int64_t t = n; t < filled; t++) row[t] = most + 2 * LEAST;
        float share = 1.0f / powers_row(row, filled, most);
#pragma omp simd
        for (int64_t t = 0; t < n; t++) row[t] *= share;
    }
    for (int64_t t = 0; t < n; t++) {
        const number *value = v + slots[t] * token;
        for (int64_t g = 0; g < group; g++) {
            float *sum = sums + g * d, weight = scores[g * padded_n + t];
#pragma omp simd
            for (int64_t j = 0; j < d; j++) sum[j] += weight * wide(value[j]);
        }
    }
    for (int64_t j = 0; j < group * d; j++) out[j] = narrow(sums[j]);
}

int attend_slots(const number *q, const number *k, const number *v, const int64_t *table, const int64_t *lengths,
                 int64_t rows, int64_t tokens, int64_t longest, int64_t kv, int64_t group, int64_t d, float scale,
                 number *out, int threads) {
    int status = DONE;
    int64_t padded_n = (longest + WHOLE - 1) / WHOLE * WHOLE;
#pragma omp parallel num_threads(threads)
    {
        float *room = scratch((size_t)(group * (2 * d + padded_n)), &status);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * tokens * kv; i++) {
            int64_t row = i / kv / tokens, after = tokens - 1 - i / kv % tokens, head = i % kv, at = i * group * d;
            if (room)
                attend_own(q + at, k + head * d, v + head * d, table + row * longest, lengths[row] - after, kv * d,
                           group, d, scale, room, padded_n, out + at);
        }
        free(room);
    }
    return status;
}
