/* For x86-64 with AVX2. */
#if defined(__x86_64__)
#pragma GCC target("avx2")
#include <immintrin.h>
#define XXH_VECTOR 2 /* XXH_AVX2 */
#define FUSED mmcache_copy_avx2
#define FEED mmcache_feed_avx2
#define COPY_LINE(buffer, target, source, stream)                                                                      \
    do {                                                                                                               \
        for (int part = 0; part < 2; part++) {                                                                         \
            __m256i word = _mm256_loadu_si256((const __m256i *)(source) + part);                                       \
            _mm256_store_si256((__m256i *)(buffer) + part, word);                                                      \
            if (stream)                                                                                                \
                _mm256_stream_si256((__m256i *)(target) + part, word);                                                 \
            else                                                                                                       \
                _mm256_storeu_si256((__m256i *)(target) + part, word);                                                 \
        }                                                                                                              \
    } while (0)
#define STREAM_FENCE() _mm_sfence()
#include "fused.h"
#endif
