/* Dequantization of pack-quantized INT4 rows, for native.py, which compiles it on the user's
 * machine. A group has only sixteen possible values: they are computed and rounded once, and
 * every nibble of the group becomes a look-up in that table.
 *
 * Bytes are read in order, low nibble first: little-endian hosts only (native.py sees to it).
 */
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

/* The last two are rounded to 16 bits but held as floats, for products in float32. */
enum kind { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, WIDE_BFLOAT16 = 3, WIDE_FLOAT16 = 4 };

/* Vectors as wide as the processor's, in the extension that GCC and Clang share: what is written in
 * one piece can be read back in one piece without waiting for the cache. */
#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline))
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

/* Rounded to bfloat16 in the upper halves, to nearest even as torch does; every NaN becomes
 * torch's. */
INLINE void round_to_bfloat16(floats *levels) {
    const words bits = (words)*levels;
    const words nan = (words)((bits & 0x7fffffffu) > 0x7f800000u);
    const words even = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    *levels = (floats)((even & ~nan) | (nan & 0x7fc00000u));
}

INLINE void to_bfloat16(const floats *levels, uint16_t *table) {
    floats rounded = *levels;
    round_to_bfloat16(&rounded);
    const halves values = __builtin_convertvector((words)rounded >> 16, halves);
    memcpy(table, &values, sizeof values);
}

INLINE void to_float16(const floats *levels, uint16_t *table) {
#if defined(__AVX512F__)
    const __m256i values = _mm512_cvtps_ph((__m512)*levels, _MM_FROUND_TO_NEAREST_INT);
    memcpy(table, &values, sizeof values);
#elif defined(__F16C__)
    const __m128i values = _mm256_cvtps_ph((__m256)*levels, _MM_FROUND_TO_NEAREST_INT);
    memcpy(table, &values, sizeof values);
#elif defined(__FLT16_MAX__)
    for (int lane = 0; lane < LANES; lane++) {
        const _Float16 value = (_Float16)(*levels)[lane];
        memcpy(table + lane, &value, sizeof value);
    }
#else
    (void)levels, (void)table; /* native.py asks shardsurgeon_has_float16 first */
#endif
}

INLINE void from_float16(const uint16_t *table, floats *levels) {
#if defined(__AVX512F__)
    *levels = (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)table));
#elif defined(__F16C__)
    *levels = (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)table));
#elif defined(__FLT16_MAX__)
    for (int lane = 0; lane < LANES; lane++) {
        _Float16 value;
        memcpy(&value, table + lane, sizeof value);
        (*levels)[lane] = (float)value;
    }
#else
    (void)table, (void)levels;
#endif
}

/* n bytes -> 2 n values of 16 bits. */
INLINE void look_up_16(const uint8_t *restrict source, int64_t n, const uint16_t *restrict table,
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
INLINE void look_up_32(const uint8_t *restrict source, int64_t n, const float *restrict table,
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
#elif defined(__AVX2__)
    /* A nibble's low three bits choose in both halves of the table, its fourth between the two:
     * permutations see bits 0 to 2 of a lane only, and blending its sign. */
    const __m256 lower = _mm256_loadu_ps(table), upper = _mm256_loadu_ps(table + 8);
    const __m256i to_bottom = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i to_sign = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    for (; i + 4 <= n; i += 4) {
        int32_t word;
        memcpy(&word, source + i, sizeof word);
        const __m256i b = _mm256_set1_epi32(word), index = _mm256_srlv_epi32(b, to_bottom);
        const __m256 l = _mm256_permutevar8x32_ps(lower, index);
        const __m256 u = _mm256_permutevar8x32_ps(upper, index);
        const __m256 sign = _mm256_castsi256_ps(_mm256_sllv_epi32(b, to_sign));
        _mm256_storeu_ps(out + 2 * i, _mm256_blendv_ps(l, u, sign));
    }
#endif
    for (; i < n; i++) {
        out[2 * i] = table[source[i] & 15];
        out[2 * i + 1] = table[source[i] >> 4];
    }
}

/* `count` values of one group. `source` is the byte of the first one, its low nibble. */
INLINE void dequantize_group(const uint8_t *source, int64_t count, int zero, float scale,
                         enum kind kind, void *out) {
    uint16_t narrow[16];
    float wide[16];
    for (int first = 0; first < 16; first += LANES) {
        floats levels;
        for (int lane = 0; lane < LANES; lane++)
            levels[lane] = (float)(first + lane - 8);
        levels = (levels - (float)zero) * scale;
        if (kind == BFLOAT16) to_bfloat16(&levels, narrow + first);
        if (kind == FLOAT16 || kind == WIDE_FLOAT16) to_float16(&levels, narrow + first);
        if (kind == WIDE_BFLOAT16) round_to_bfloat16(&levels);
        if (kind == WIDE_FLOAT16) from_float16(narrow + first, &levels);
        memcpy(wide + first, &levels, sizeof levels);
    }
    if (kind == BFLOAT16 || kind == FLOAT16) {
        uint16_t *to = out;
        look_up_16(source, count / 2, narrow, to);
        if (count & 1) to[count - 1] = narrow[source[count / 2] & 15];
    } else {
        float *to = out;
        look_up_32(source, count / 2, wide, to);
        if (count & 1) to[count - 1] = wide[source[count / 2] & 15];
    }
}

int shardsurgeon_has_float16(void) {
#if defined(__AVX512F__) || defined(__F16C__) || defined(__FLT16_MAX__)
    return 1;
#else
    return 0;
#endif
}

/* One row. Inlined for each kind, so that nothing asks for the kind once per group. */
INLINE void dequantize_row(const uint8_t *packed, const float *scale, const int8_t *zero,
                           int64_t columns, int64_t groups, int64_t group_size, enum kind kind,
                           char *out) {
    const int64_t width = kind == BFLOAT16 || kind == FLOAT16 ? 2 : 4;
    for (int64_t group = 0; group < groups; group++) {
        const int64_t begin = group * group_size, left = columns - begin;
        dequantize_group(packed + begin / 2, left < group_size ? left : group_size,
                         zero ? zero[group] : 0, scale[group], kind, out + begin * width);
    }
}

/* packed: rows of row_nbytes bytes. scale: [rows, groups]. zero: the same, or null.
 * out: [rows, columns] of `kind`. group_size is even unless there is one group. */
void shardsurgeon_dequantize(const uint8_t *packed, int64_t row_nbytes, const float *scale,
                            const int8_t *zero, int64_t rows, int64_t columns, int64_t groups,
                            int64_t group_size, int kind, void *out, int threads) {
    const int64_t width = kind == BFLOAT16 || kind == FLOAT16 ? 2 : 4;
    (void)threads; /* unused where OpenMP is off */
    /* Small shares, so that a slower core or a busy one takes fewer. */
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t row = 0; row < rows; row++) {
        const uint8_t *source = packed + row * row_nbytes;
        const float *scales = scale + row * groups;
        const int8_t *zeros = zero ? zero + row * groups : 0;
        char *to = (char *)out + row * columns * width;
#define ROW(KIND)                                                                        \
    case KIND:                                                                           \
        dequantize_row(source, scales, zeros, columns, groups, group_size, KIND, to);    \
        break;
        switch ((enum kind)kind) {
            ROW(FLOAT32)
            ROW(BFLOAT16)
            ROW(FLOAT16)
            ROW(WIDE_BFLOAT16)
            ROW(WIDE_FLOAT16)
        }
#undef ROW
    }
}
