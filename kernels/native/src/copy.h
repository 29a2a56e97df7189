/* One tensor to move, and the functions that move many, or a part of one: one of each for each instruction set. */
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

struct XXH3_state_s;

/* Copy `nbytes` and add what was written to the hash; without a `target` only that. With `stream` past the caches. */
typedef void fused_feed(struct XXH3_state_s *state, const char *source, char *target, size_t nbytes, int stream);

/* Copy every move and write its xxh3-128 (canonical, 16 bytes) to `digests`. With `stream` past the CPU's caches. */
typedef void fused_copy(const struct move *moves, size_t count, int stream, unsigned char *digests);
fused_copy mmcache_copy_plain;
fused_feed mmcache_feed_plain;
#if defined(__x86_64__)
fused_copy mmcache_copy_avx2, mmcache_copy_avx512;
fused_feed mmcache_feed_avx2, mmcache_feed_avx512;
#endif
#endif
