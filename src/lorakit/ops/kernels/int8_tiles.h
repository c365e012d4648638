/* Int8 matmuls of blocks with the matrix unit AMX, for int8_matmul.h. */

#if defined(INT8_MATMULS) && defined(TILES)
/* sums (PANEL, PANEL) = a·b for PANEL rows of a, with n values each, and a packed panel b */
static void multiply_with_tiles(const int8_t *a, int64_t n, const int8_t *b, int32_t *sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < n; k += TILE_STEP, b += 2 * TILE_BYTES) {
        _tile_loadd(4, a + k, n);
        _tile_loadd(6, b, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, b + TILE_BYTES, 64);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, a + EDGE * n + k, n);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, sums, PANEL * 4);
    _tile_stored(1, sums + EDGE, PANEL * 4);
    _tile_stored(2, sums + EDGE * PANEL, PANEL * 4);
    _tile_stored(3, sums + EDGE * PANEL + EDGE, PANEL * 4);
}
#endif
