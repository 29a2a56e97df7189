/* One pass over memory: each line is read once, and written both to its target and to a small buffer in the CPU's first
 * cache, where it is hashed. So what was hashed is what was written, whatever happens to the source meanwhile.
 *
 * Included once for each instruction set: FUSED and FEED name the functions, and COPY_LINE(buffer, target, source, stream)
 * copies 64 bytes to both; with `stream`, which is a constant, to the target past the caches: it is aligned then.
 */
#define XXH_INLINE_ALL
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <xxhash.h>

#include "copy.h"

#define LINE 64
#define CHUNK 4096 /* bytes hashed at a time: in the first cache still, and far more than a call of the hash costs */
/* The buffer is in memory now, and only there: without this a compiler may read the source a second time. */
#define KEEP(buffer) __asm__ volatile("" : : "r"(buffer) : "memory")
#define AHEAD 8192     /* bytes: memory that far on is on its way while a chunk is hashed */
#define ONCE_AHEAD 2048 /* the same of memory that is read once and not wanted in the caches: less of it stays there */

static inline __attribute__((always_inline)) void copy_chunk(char *buffer, char *target, const char *source,
                                                             size_t nbytes, int stream, int once)
{
    size_t at = 0;
    for (; at + LINE <= nbytes; at += LINE) {
        COPY_LINE(buffer + at, target + at, source + at, stream);
        if (once)
            __builtin_prefetch(source + at + ONCE_AHEAD, 0, 0);
        else
            __builtin_prefetch(source + at + AHEAD, 0, 3);
    }
    memcpy(buffer + at, source + at, nbytes - at);
    KEEP(buffer);
    memcpy(target + at, buffer + at, nbytes - at);
}

static inline __attribute__((always_inline)) void copy_run(XXH3_state_t *state, const char *source, char *target,
                                                           size_t nbytes, int stream, int once)
{
    _Alignas(LINE) char buffer[CHUNK];
    while (nbytes) {
        size_t count = nbytes < CHUNK ? nbytes : CHUNK;
        size_t off = (uintptr_t)target % LINE;
        if (stream && !off) {
            copy_chunk(buffer, target, source, count, 1, once);
        } else {
            if (stream && count > LINE - off)
                count = LINE - off; /* to the next line, once: every later chunk begins on one */
            copy_chunk(buffer, target, source, count, 0, once);
        }
        XXH3_128bits_update(state, buffer, count);
        source += count;
        target += count;
        nbytes -= count;
    }
}

void FUSED(const struct move *moves, size_t count, int stream, unsigned char *digests)
{
    for (size_t number = 0; number < count; number++) {
        const struct move *move = moves + number;
        XXH3_state_t state;
        XXH3_128bits_reset(&state);
        const char *source = move->source;
        for (size_t row = 0; row < move->rows; row++, source += move->row_nbytes)
            copy_run(&state, source, move->target + (ptrdiff_t)row * move->stride, move->row_nbytes, stream, 1);
        XXH128_canonicalFromHash((XXH128_canonical_t *)(digests + 16 * number), XXH3_128bits_digest(&state));
    }
    if (stream)
        STREAM_FENCE();
}

void FEED(XXH3_state_t *state, const char *source, char *target, size_t nbytes, int stream)
{
    if (!target) {
        XXH3_128bits_update(state, source, nbytes);
        return;
    }
    if (stream)
        copy_run(state, source, target, nbytes, 1, 0);
    else
        copy_run(state, source, target, nbytes, 0, 1);
    if (stream)
        STREAM_FENCE();
}
