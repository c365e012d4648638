/* bench_fused_quantization.py: quantization of rows after a norm or activation, in a second pass and in the same pass. */
#include "rows.c"

#include <stdio.h>
#include <time.h>

#define WIDE 1536
#define MOST (512 * WIDE)
#define OTHER (1 << 21) /* bytes of other data that are written before each measurement */

enum { NORM, GATE, GATE_BACKWARD };

static number x[MOST], up[MOST], da[MOST], out[MOST], dgate[MOST], weight[WIDE];
static int8_t q[MOST], q_up[MOST];
static float factors[WIDE], scale[512], scale_up[512];
static char other[OTHER];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void make(int what, int64_t i, int64_t d) {
    const number *row = x + i * d;
    if (what == NORM) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < d; j++) sum += wide(row[j]) * wide(row[j]);
        rms_row(row, weight, 1.0f / sqrtf(sum / (float)d + 1e-5f), 0.0f, d, out + i * d);
    } else if (what == GATE) {
        gate_row(SILU, row, up + i * d, d, out + i * d);
    } else {
        gate_backward_row(SILU, da + i * d, row, up + i * d, d, out + i * d, dgate + i * d);
    }
}

static void quantize(int what, int64_t i, int64_t d) {
    scale[i] = quantize_row(out + i * d, factors, d, q + i * d);
    if (what == GATE_BACKWARD) scale_up[i] = quantize_row(dgate + i * d, factors, d, q_up + i * d);
}

int main(int count, char **words) { /* kind, width, rows, rounds: prints the seconds of both sides, one round per line */
    if (count != 5) return 1;
    int what = atoi(words[1]);
    int64_t d = atoi(words[2]), rows = atoi(words[3]), rounds = atoi(words[4]);
    for (int64_t i = 0; i < MOST; i++) {
        x[i] = narrow(3.0f * sinf(0.37f * (float)i)), up[i] = narrow(cosf(0.11f * (float)i));
        da[i] = narrow(sinf(0.71f * (float)i));
    }
    for (int64_t j = 0; j < WIDE; j++) weight[j] = narrow(1.0f), factors[j] = 1.0f;
    for (int64_t round = 0; round < rounds; round++) {
        double seconds[2];
        for (int fused = 0; fused < 2; fused++) {
            memset(other, (int)round, OTHER);
            double begin = now();
            for (int64_t i = 0; i < rows; i++) {
                make(what, i, d);
                if (fused) quantize(what, i, d);
            }
            for (int64_t i = 0; !fused && i < rows; i++) quantize(what, i, d);
            seconds[fused] = now() - begin;
        }
        printf("%.9f %.9f\n", seconds[0], seconds[1]);
    }
    return 0;
}
