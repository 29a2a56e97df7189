/* For x86-64 with AVX-512. */
#if defined(__x86_64__)
#pragma GCC target("avx512f")
#include <immintrin.h>
#define XXH_VECTOR 3 /* XXH_AVX512 */
#define FUSED mmcache_copy_avx512
#define FEED mmcache_feed_avx512
#define COPY_LINE(buffer, target, source, stream)                                                                      \
    do {                                                                                                               \
        __m512i word = _mm512_loadu_si512(source);                                                                     \
        _mm512_store_si512(buffer, word);                                                                              \
        if (stream)                                                                                                    \
            _mm512_stream_si512((__m512i *)(target), word);                                                            \
        else                                                                                                           \
            _mm512_storeu_si512(target, word);                                                                         \
    } while (0)
#define STREAM_FENCE() _mm_sfence()
#include "fused.h"
#endif
