/* Row-wise and elementwise operations between matmuls, each in one pass.
 *
 * building.py compiles this file, with the headers that it includes, once per dtype: with -DBF16 for bfloat16, and
 * without it for fp32. The code does not depend on PyTorch: arguments are pointers and sizes. All intermediate results
 * are fp32, and values are rounded when they are stored. protocol.py documents each function. If there is no compiler,
 * PyTorch operations compute the same results.
 */
#include "numbers.h"

#include "dropout.h"

/* ---- check integers before a kernel uses them as positions: returns whether all are in [low, high] */

#define ALL_WITHIN(name, integer)                                                    \
    int name(const integer *at, int64_t count, int64_t low, int64_t high) {          \
        int within = 1;                                                              \
        for (int64_t i = 0; i < count; i++) within &= at[i] >= low && at[i] <= high; \
        return within;                                                               \
    }

ALL_WITHIN(all_within_32, int32_t)
ALL_WITHIN(all_within_64, int64_t)

/* ---- norms */

static inline void rms_row(const number *x, const number *w, float r, float offset, int64_t d, number *n) {
    if (offset == 0.0f) {
        for (int64_t j = 0; j < d; j++) n[j] = narrow(wide(narrow(wide(x[j]) * r)) * wide(w[j]));
    } else {
        for (int64_t j = 0; j < d; j++) n[j] = narrow(wide(x[j]) * r * (offset + wide(w[j])));
    }
}

int rms_forward(const number *x, const number *w, float eps, float offset, int64_t rows, int64_t d, number *n,
                float *rstd, int threads) {
    ROWS(i, rows) {
        const number *row = x + i * d;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < d; j++) sum += wide(row[j]) * wide(row[j]);
        rstd[i] = 1.0f / sqrtf(sum / (float)d + eps);
        rms_row(row, w, rstd[i], offset, d, n + i * d);
    }
    return DONE;
}

int rms_recompute(const number *x, const number *w, float offset, const float *rstd, int64_t rows, int64_t d, number *n,
              int threads) {
    ROWS(i, rows) rms_row(x + i * d, w, rstd[i], offset, d, n + i * d);
    return DONE;
}

int rms_backward(const number *dn, const number *x, const number *w, float offset, const float *rstd,
                 const number *add, int64_t rows, int64_t d, number *dx, int threads) {
    ROWS(i, rows) {
        const number *g = dn + i * d, *row = x + i * d, *more = add ? add + i * d : 0;
        number *out = dx + i * d;
        float r = rstd[i], dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < d; j++) dot += wide(g[j]) * (offset + wide(w[j])) * wide(row[j]);
        float share = dot * r * r * r / (float)d;
#pragma omp simd
        for (int64_t j = 0; j < d; j++) {
            float v = wide(g[j]) * (offset + wide(w[j])) * r - wide(row[j]) * share;
            out[j] = narrow(more ? v + wide(more[j]) : v);
        }
    }
    return DONE;
}

/* ---- activations: f(x) and f'(x) */

enum { SILU, GELU_TANH, QUICK_GELU, RELU };

#define SLOPE 1.5957691216057308f /* 2·sqrt(2/pi) */
#define CUBE 0.044715f
#define QUICK 1.702f

static inline float inner(int act, float x) { /* f(x) = x·sigmoid(inner(x)) */
    return act == SILU ? x : act == QUICK_GELU ? QUICK * x : SLOPE * x * (1.0f + CUBE * x * x);
}

static inline float slope(int act, float x) {
    return act == SILU ? 1.0f : act == QUICK_GELU ? QUICK : SLOPE * (1.0f + 3.0f * CUBE * x * x);
}

static inline void gate_row(int act, const number *first, const number *up, int64_t n, number *out) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        float x = wide(first[j]);
        float f = act == RELU ? (x < 0.0f ? 0.0f : x) : x * sigmoid(inner(act, x));
        out[j] = narrow(up ? f * wide(up[j]) : f);
    }
}

static inline void gate_backward_row(int act, const number *da, const number *first, const number *up, int64_t n,
                                     number *dfirst, number *dup) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        float x = wide(first[j]), g = wide(da[j]);
        float s = act == RELU ? (x > 0.0f) : sigmoid(inner(act, x));
        float f = x * s, df = act == RELU ? s : s * (1.0f + x * (1.0f - s) * slope(act, x));
        if (up) {
            float u = wide(up[j]);
            dup[j] = narrow(g * f);
            g *= u;
        }
        dfirst[j] = narrow(g * df);
    }
}

#define EACH_ACTIVATION(call) /* one loop per activation, without a branch inside it */            \
    switch (act) {                                                                                 \
    case SILU: call(SILU); break;                                                                  \
    case GELU_TANH: call(GELU_TANH); break;                                                        \
    case QUICK_GELU: call(QUICK_GELU); break;                                                      \
    default: call(RELU);                                                                           \
    }

int gate(int act, const number *first, const number *up, int64_t count, number *out, int threads) {
    ROWS(b, (count + BLOCK - 1) / BLOCK) {
        int64_t at = b * BLOCK, n = shorter(BLOCK, count - at);
        const number *u = up ? up + at : 0;
#define CALL(which) gate_row(which, first + at, u, n, out + at)
        EACH_ACTIVATION(CALL)
#undef CALL
    }
    return DONE;
}

int gate_backward(int act, const number *da, const number *first, const number *up, int64_t count, number *dfirst,
                  number *dup, int threads) {
    ROWS(b, (count + BLOCK - 1) / BLOCK) {
        int64_t at = b * BLOCK, n = shorter(BLOCK, count - at);
        const number *u = up ? up + at : 0;
        number *du = up ? dup + at : 0;
#define CALL(which) gate_backward_row(which, da + at, first + at, u, n, dfirst + at, du)
        EACH_ACTIVATION(CALL)
#undef CALL
    }
    return DONE;
}

/* ---- rotary position embeddings */

static inline void rotate_head(const number *x, const number *c, const number *s, int64_t rot, float direction,
                               number *out) {
    int64_t half = rot / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        int64_t k = i + half;
        float a = wide(x[i]), b = wide(x[k]);
        /* each sine comes from the element's own index in the forward direction, and from the other index backward */
        float sa = direction > 0 ? wide(s[i]) : -wide(s[k]), sb = direction > 0 ? wide(s[k]) : -wide(s[i]);
        out[i] = narrow(a * wide(c[i]) - b * sa);
        out[k] = narrow(b * wide(c[k]) + a * sb);
    }
}

int rotate(const number *x, int64_t x_stride, const number *cos, const number *sin, int64_t table_rows, int64_t rows,
         int64_t heads, int64_t width, int64_t rot, int back, number *out, int64_t out_stride, int threads) {
    float direction = back ? -1.0f : 1.0f;
    ROWS(i, rows) {
        const number *c = cos + (i % table_rows) * rot, *s = sin + (i % table_rows) * rot;
        for (int64_t h = 0; h < heads; h++) {
            const number *from = x + i * x_stride + h * width;
            number *to = out + i * out_stride + h * width;
            rotate_head(from, c, s, rot, direction, to);
            if (rot < width && from != to) memcpy(to + rot, from + rot, (size_t)(width - rot) * sizeof(number));
        }
    }
    return DONE;
}

/* ---- softmax of rows; each row is limited to the positions [low, high) */

static inline float powers_row(float *e, int64_t n, float most) { /* sets e[j] to exp(e[j] − most); returns the sum */
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) {
        e[j] = power_of_e(e[j] - most);
        sum += e[j];
    }
    return sum;
}

static inline float upcast_row(const number *row, float scale, int64_t n, float *e) { /* returns the maximum */
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < n; j++) {
        e[j] = wide(row[j]) * scale;
        most = e[j] > most ? e[j] : most;
    }
    return most;
}

static inline void scale_row(const float *e, float share, int64_t n, number *row) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) row[j] = narrow(e[j] * share);
}

#define WHOLE 16 /* exponentials are computed in groups of this size; padding values have a negligible exponential */

int softmax(number *scores, const int32_t *low, const int32_t *high, int64_t kinds, int64_t rows, int64_t m,
            int threads) {
    for (int64_t k = 0; low && high && k < kinds; k++)
        if (low[k] > high[k]) return DISORDER;
    int status = DONE;
#pragma omp parallel num_threads(threads)
    {
        float *e = scratch((size_t)(m + WHOLE), &status);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            if (!e) continue;
            int64_t first = low ? low[i % kinds] : 0, n = (high ? high[i % kinds] : m) - first;
            number *row = scores + i * m, *seen = row + first;
            float most = upcast_row(seen, 1.0f, n, e);
            int64_t filled = (n + WHOLE - 1) / WHOLE * WHOLE;
            for (int64_t j = n; j < filled; j++) e[j] = most + 2 * LEAST;
            float sum = powers_row(e, filled, most);
            memset(row, 0, (size_t)first * sizeof(number));
            scale_row(e, 1.0f / sum, n, seen);
            memset(seen + n, 0, (size_t)(m - first - n) * sizeof(number));
        }
        free(e);
    }
    return status;
}

int softmax_backward(const number *weights, int64_t rows, int64_t m, number *ds, int threads) {
    ROWS(i, rows) {
        const number *w = weights + i * m;
        number *d = ds + i * m;
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < m; j++) dot += wide(w[j]) * wide(d[j]);
#pragma omp simd
        for (int64_t j = 0; j < m; j++) d[j] = narrow(wide(w[j]) * (wide(d[j]) - dot));
    }
    return DONE;
}

/* ---- cross-entropy of rows of logits; the gradient of the summed losses replaces the logits */

int cross_entropy(number *logits, const int64_t *labels, float scale, int gradients, int64_t rows, int64_t v,
                  float *losses, int threads) {
    int status = DONE;
#pragma omp parallel num_threads(threads)
    {
        float *e = scratch((size_t)v, &status);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            if (!e) continue;
            number *row = logits + i * v;
            float most = upcast_row(row, scale, v, e), own = e[labels[i]];
            float sum = powers_row(e, v, most);
            losses[i] = logf(sum) + most - own;
            if (!gradients) continue;
            scale_row(e, 1.0f / sum, v, row);
            row[labels[i]] = narrow(e[labels[i]] / sum - 1.0f);
        }
        free(e);
    }
    return status;
}

#include "own.h"
#include "attend_slots.h"
#include "int8.h"
#include "int8_few.h"

#include "tiles.h"

#include "dot.h"

#include "attention.h"

#include "int8_panels.h"
#include "int8_tiles.h"
#include "int8_vectors.h"

#include "int8_matmul.h"

#include "low_rank.h"

#include "linear_few.h"

#include "decoder_layer.h"
