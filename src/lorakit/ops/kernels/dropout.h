/* Dropout. The gaps between dropped elements are geometrically distributed. Each block of elements has its own random
 * stream, so that threads are independent. The geometric distribution is memoryless, so splitting the elements into
 * blocks does not change the result's distribution. */

#define LANES 16

static inline uint64_t mixed(uint64_t z) { /* the finalizer of SplitMix64 (Steele, Lea and Flood 2014) */
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static inline int64_t gaps(uint64_t key, uint64_t from, float each, int32_t *gap) {
#pragma omp simd
    for (int j = 0; j < LANES; j++) {
        uint32_t bits = (uint32_t)(mixed(key + (from + (uint64_t)j) * 0x9e3779b97f4a7c15u) >> 32);
        float u = ((float)(bits >> 1) + 0.5f) * 4.656612873077393e-10f; /* (0, 1] in steps of 2^-31 */
        float distance = logarithm(u) * each;
        gap[j] = distance > 1e9f ? 1000000000 : (int32_t)distance;
    }
    return LANES;
}

static inline int64_t far_gaps(uint64_t key, uint64_t from, double each, int32_t *gap) { /* for small p, for which fp32 is too coarse */
    for (int j = 0; j < LANES; j++) {
        double u = ((double)(mixed(key + (from + (uint64_t)j) * 0x9e3779b97f4a7c15u) >> 12) + 0.5) * 0x1p-52;
        double distance = log(u) * each;
        gap[j] = distance > 1e9 ? 1000000000 : (int32_t)distance;
    }
    return LANES;
}

int drop(const number *x, int64_t count, double p, uint64_t seed, float scale, number *out, int threads) {
    double each = 1.0 / log1p(-p);
    ROWS(b, (count + BLOCK - 1) / BLOCK) {
        int64_t at = b * BLOCK, n = shorter(BLOCK, count - at);
        number *to = out + at;
        if (scale != 1.0f) {
#pragma omp simd
            for (int64_t j = 0; j < n; j++) to[j] = narrow(wide(x[at + j]) * scale);
        } else if (x != out) {
            memcpy(to, x + at, (size_t)n * sizeof(number));
        }
        int32_t gap[LANES];
        uint64_t key = mixed(seed + mixed((uint64_t)b)), drawn = 0;
        for (int64_t place = 0; place < n;) {
            drawn += (uint64_t)(p < 1e-3 ? far_gaps(key, drawn, each, gap) : gaps(key, drawn, (float)each, gap));
            for (int j = 0; j < LANES; j++) {
                place += gap[j];
                if (place >= n) break;
                to[place++] = 0;
            }
        }
    }
    return DONE;
}
