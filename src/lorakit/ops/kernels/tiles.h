/* The tile registers of the matrix unit AMX. They are set up for the time of a function, because other libraries in the
 * process use them too. Without AMX, no function here is compiled except has_tiles. */

#define EDGE 16 /* rows of a tile, and 4-byte elements in each of its rows */

typedef struct { /* LDTILECFG */
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) Tiles;

#if defined(BF16) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

static int permitted; /* whether the system permits the use of tiles; set by has_tiles */

/* sets up this thread's tile registers as EDGE rows of 64 bytes, and returns what they were before */
static Tiles begin_tiles(void) {
    Tiles before, now = {.palette = 1};
    for (int i = 0; i < 8; i++) now.bytes[i] = 64, now.rows[i] = EDGE;
    _tile_storeconfig(&before);
    _tile_loadconfig(&now);
    return before;
}

static void end_tiles(Tiles before) {
    if (before.palette)
        _tile_loadconfig(&before);
    else
        _tile_release();
}
#endif

/* asks the system for the tile registers, and returns whether this library can use them */
int has_tiles(void) {
#ifdef TILES
    permitted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */) == 0;
    return permitted;
#else
    return 0;
#endif
}
