/* One tensor to move, and the functions that move many: one for each instruction set. */
#ifndef MMCACHE_NATIVE_COPY_H
#define MMCACHE_NATIVE_COPY_H
#include <stddef.h>

/* `rows` pieces of `row_nbytes`, packed at `source`, `stride` bytes apart at `target`. */
struct move {
    const char *source;
    char *target;
    size_t rows, row_nbytes;
    ptrdiff_t stride;
};

/* Copy every move and write its xxh3-128 (canonical, 16 bytes) to `digests`. With `stream` past the CPU's caches. */
typedef void fused_copy(const struct move *moves, size_t count, int stream, unsigned char *digests);
fused_copy mmcache_copy_plain;
#if defined(__x86_64__)
fused_copy mmcache_copy_avx2, mmcache_copy_avx512;
#endif
#endif
