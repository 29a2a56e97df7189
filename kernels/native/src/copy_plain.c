/* For every processor: the compiler's baseline. */
#define FUSED mmcache_copy_plain
#define FEED mmcache_feed_plain
#if defined(__x86_64__)
#include <emmintrin.h>
#define COPY_LINE(buffer, target, source, stream)                                                                      \
    do {                                                                                                               \
        for (int part = 0; part < 4; part++) {                                                                         \
            __m128i word = _mm_loadu_si128((const __m128i *)(source) + part);                                          \
            _mm_store_si128((__m128i *)(buffer) + part, word);                                                         \
            if (stream)                                                                                                \
                _mm_stream_si128((__m128i *)(target) + part, word);                                                    \
            else                                                                                                       \
                _mm_storeu_si128((__m128i *)(target) + part, word);                                                    \
        }                                                                                                              \
    } while (0)
#define STREAM_FENCE() _mm_sfence()
#else
#define COPY_LINE(buffer, target, source, stream)                                                                              \
    do {                                                                                                               \
        memcpy(buffer, source, 64);                                                                                    \
        KEEP(buffer);                                                                                                  \
        memcpy(target, buffer, 64);                                                                                    \
    } while (0)
#define STREAM_FENCE() ((void)0)
#endif
#include "fused.h"
