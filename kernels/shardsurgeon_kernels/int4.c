/* Dequantization of pack-quantized INT4 rows, for native.py, which compiles it on the user's
 * machine. A group has only sixteen possible values: they are computed and rounded once, and
 * every nibble of the group becomes a look-up in that table.
 *
 * Bytes are read in order, low nibble first: little-endian hosts only (native.py sees to it).
 */
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) || defined(__AVX512BW__)
#include <immintrin.h>
#endif

enum kind { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* Sixteen lanes, in the extension that GCC and Clang share. */
typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

/* Rounded to nearest even, as torch does; every NaN becomes torch's. */
static inline void to_bfloat16(const floats *levels, uint16_t *table) {
    const words bits = (words)*levels;
    const words nan = (words)((bits & 0x7fffffffu) > 0x7f800000u);
    const words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const halves values = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), halves);
    memcpy(table, &values, sizeof values);
}

static inline void to_float16(const floats *levels, uint16_t *table) {
#if defined(__AVX512F__)
    __m512 values;
    memcpy(&values, levels, sizeof values);
    _mm256_storeu_si256((__m256i *)table, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__FLT16_MAX__)
    for (int nibble = 0; nibble < 16; nibble++) {
        const _Float16 value = (_Float16)(*levels)[nibble];
        memcpy(table + nibble, &value, sizeof value);
    }
#else
    (void)levels, (void)table; /* native.py asks shardsurgeon_has_float16 first */
#endif
}

/* n bytes -> 2 n values of 16 bits. */
static void look_up_16(const uint8_t *restrict source, int64_t n, const uint16_t *restrict table,
                       uint16_t *restrict out) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    /* The table lies in the register twice, so that bit 4 of an index does not matter: the low
     * half of (b | b << 12) looks up b's low nibble, the high half its high nibble. */
    const __m512i tables = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)table));
    for (; i + 16 <= n; i += 16) {
        __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(source + i)));
        b = _mm512_or_si512(b, _mm512_slli_epi32(b, 12));
        _mm512_storeu_si512(out + 2 * i, _mm512_permutexvar_epi16(b, tables));
    }
#elif defined(__AVX2__)
    /* Low and high bytes of the table's values, looked up separately and zipped. */
    const __m128i first = _mm_loadu_si128((const __m128i *)table);
    const __m128i second = _mm_loadu_si128((const __m128i *)(table + 8));
    const __m128i byte = _mm_set1_epi16(255), nibble = _mm_set1_epi8(15);
    const __m128i low_bytes =
        _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
    const __m128i high_bytes =
        _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    for (; i + 16 <= n; i += 16) {
        const __m128i b = _mm_loadu_si128((const __m128i *)(source + i));
        const __m128i low = _mm_and_si128(b, nibble);
        const __m128i high = _mm_and_si128(_mm_srli_epi16(b, 4), nibble);
        const __m128i index[2] = {_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high)};
        for (int half = 0; half < 2; half++) {
            const __m128i l = _mm_shuffle_epi8(low_bytes, index[half]);
            const __m128i h = _mm_shuffle_epi8(high_bytes, index[half]);
            __m128i *place = (__m128i *)(out + 2 * i + 16 * half);
            _mm_storeu_si128(place, _mm_unpacklo_epi8(l, h));
            _mm_storeu_si128(place + 1, _mm_unpackhi_epi8(l, h));
        }
    }
#endif
    for (; i < n; i++) {
        out[2 * i] = table[source[i] & 15];
        out[2 * i + 1] = table[source[i] >> 4];
    }
}

/* n bytes -> 2 n floats. */
static void look_up_32(const uint8_t *restrict source, int64_t n, const float *restrict table,
                       float *restrict out) {
    int64_t i = 0;
#if defined(__AVX512F__)
    /* Indices count modulo 16, so the nibble above the low one does not matter. */
    const __m512 values = _mm512_loadu_ps(table);
    for (; i + 8 <= n; i += 8) {
        __m512i b = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(source + i)));
        b = _mm512_or_si512(b, _mm512_slli_epi64(b, 28));
        _mm512_storeu_ps(out + 2 * i, _mm512_permutexvar_ps(b, values));
    }
#endif
    for (; i < n; i++) {
        out[2 * i] = table[source[i] & 15];
        out[2 * i + 1] = table[source[i] >> 4];
    }
}

/* `count` values of one group. `source` is the byte of the first one, its low nibble. */
static void dequantize_group(const uint8_t *source, int64_t count, int zero, float scale,
                             enum kind kind, void *out) {
    const floats steps = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    const floats levels = (steps - (float)zero) * scale;
    if (kind == FLOAT32) {
        float table[16], *to = out;
        memcpy(table, &levels, sizeof levels);
        look_up_32(source, count / 2, table, to);
        if (count & 1) to[count - 1] = table[source[count / 2] & 15];
    } else {
        uint16_t table[16], *to = out;
        if (kind == FLOAT16)
            to_float16(&levels, table);
        else
            to_bfloat16(&levels, table);
        look_up_16(source, count / 2, table, to);
        if (count & 1) to[count - 1] = table[source[count / 2] & 15];
    }
}

int shardsurgeon_has_float16(void) {
#if defined(__AVX512F__) || defined(__FLT16_MAX__)
    return 1;
#else
    return 0;
#endif
}

/* packed: rows of row_nbytes bytes. scale: [rows, groups]. zero: the same, or null.
 * out: [rows, columns] of `kind`. group_size is even unless there is one group. */
void shardsurgeon_dequantize(const uint8_t *packed, int64_t row_nbytes, const float *scale,
                            const int8_t *zero, int64_t rows, int64_t columns, int64_t groups,
                            int64_t group_size, int kind, void *out, int threads) {
    const int64_t width = kind == FLOAT32 ? 4 : 2;
    (void)threads; /* unused where OpenMP is off */
    /* Small shares, so that a slower core or a busy one takes fewer. */
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t group = 0; group < groups; group++) {
            const int64_t begin = group * group_size, at = row * groups + group;
            const int64_t left = columns - begin;
            dequantize_group(packed + row * row_nbytes + begin / 2,
                             left < group_size ? left : group_size, zero ? zero[at] : 0, scale[at],
                             (enum kind)kind, (char *)out + (row * columns + begin) * width);
        }
    }
}
