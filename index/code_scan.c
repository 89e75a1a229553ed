/* How it works: the scalar kernels take one code at a time and add in four partial sums, so that
 * the look-ups of a code overlap; byte loads were faster than taking a longer load apart. Sums are
 * kept to 16 bits, so any order of adding gives the same. There is no AVX2 version: its gathers are
 * no faster than plain loads, and the 256 entries of a byte would fill all sixteen of its registers
 * twice over.
 *
 * A query's table is put on the integer scale with arithmetic that compilers turn into vectors on
 * any machine: a number below 2^22 added to 1.5 * 2^23 leaves, in the low bits of the sum, that
 * number rounded to the nearest integer. The greatest entry of a chunk is computed just as the
 * entries are, so their total, the greatest sum, is known before any entry is written. Until then a
 * chunk's least share stands in front of where its entries will, and the widths of 64 chunks stand
 * together behind that of one of them.
 *
 * The nth smallest sum is found by counting: of each upper byte first, then of the lower bytes
 * under the upper byte that the nth has. */
#include "index/code_scan.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define ENTRIES 256u
#define SUM_MAX 65535u
#define ROUNDER 12582912.0f /* 1.5 * 2^23 */
#define ROUNDER_BITS 0x4b400000u
#define SCALE_HALVINGS 10u   /* of an interval of a percent or less */
#define WIDTHS (ENTRIES / 4) /* floats in half of a chunk's entries */
#define PREFETCH_ROWS 8u     /* how far ahead */
#define CACHE_LINE 64u

/* x below 2^22, as the header of the file says; low 16 bits 0 if it is no number. */
static inline uint32_t rounded(float x)
{
    float sum = x + ROUNDER;
    uint32_t bits;

    memcpy(&bits, &sum, sizeof bits);
    return bits - ROUNDER_BITS;
}

#if defined(__SSE2__)
/* By hand: compilers leave these loops to single floats, or take detours to pack 16 bits. */
static void base_range(const float *shares, float *least, float *greatest)
{
    __m128 low[4], high[4];
    float lanes[2][4];

    for (uint32_t v = 0; v < 4; v++) {
        low[v] = _mm_set1_ps(INFINITY);
        high[v] = _mm_set1_ps(-INFINITY);
    }
    for (uint32_t i = 0; i < ENTRIES; i += 16) {
        for (uint32_t v = 0; v < 4; v++) {
            __m128 four = _mm_loadu_ps(shares + i + 4 * v);

            low[v] = _mm_min_ps(four, low[v]); /* in this order: skips what is no number */
            high[v] = _mm_max_ps(four, high[v]);
        }
    }
    _mm_storeu_ps(lanes[0], _mm_min_ps(_mm_min_ps(low[0], low[1]), _mm_min_ps(low[2], low[3])));
    _mm_storeu_ps(lanes[1], _mm_max_ps(_mm_max_ps(high[0], high[1]), _mm_max_ps(high[2], high[3])));
    *least = lanes[0][0];
    *greatest = lanes[1][0];
    for (uint32_t l = 1; l < 4; l++) {
        *least = lanes[0][l] < *least ? lanes[0][l] : *least;
        *greatest = lanes[1][l] > *greatest ? lanes[1][l] : *greatest;
    }
}

static void base_entries(const float *shares, float least, float scale, uint16_t *entries)
{
    __m128 leasts = _mm_set1_ps(least), scales = _mm_set1_ps(scale);
    __m128i half = _mm_set1_epi32(32768); /* packing saturates signed numbers */

    for (uint32_t i = 0; i < ENTRIES; i += 8) {
        __m128 a = _mm_mul_ps(_mm_sub_ps(_mm_loadu_ps(shares + i), leasts), scales);
        __m128 b = _mm_mul_ps(_mm_sub_ps(_mm_loadu_ps(shares + i + 4), leasts), scales);
        __m128i eight = _mm_packs_epi32(_mm_sub_epi32(_mm_cvtps_epi32(a), half),
                                        _mm_sub_epi32(_mm_cvtps_epi32(b), half));

        _mm_storeu_si128((__m128i *)(void *)(entries + i),
                         _mm_xor_si128(eight, _mm_set1_epi16(INT16_MIN)));
    }
}
#else
static void base_range(const float *shares, float *least, float *greatest)
{
    *least = INFINITY;
    *greatest = -INFINITY;
    for (uint32_t i = 0; i < ENTRIES; i++) {
        *least = shares[i] < *least ? shares[i] : *least;
        *greatest = shares[i] > *greatest ? shares[i] : *greatest;
    }
}

static void base_entries(const float *shares, float least, float scale, uint16_t *entries)
{
    for (uint32_t i = 0; i < ENTRIES; i++)
        entries[i] = (uint16_t)rounded((shares[i] - least) * scale);
}
#endif

static const struct code_fill_passes base_passes = {base_range, base_entries};

/* Where the entries of chunk c / WIDTHS will stand, halfway through: room for a float a chunk. */
static void *width_at(const struct code_table *table, uint32_t c)
{
    return table->entries + (size_t)(c / WIDTHS) * ENTRIES + ENTRIES / 2 + 2 * (c % WIDTHS);
}

static void width_put(const struct code_table *table, uint32_t c, float width)
{
    memcpy(width_at(table, c), &width, sizeof width);
}

/* The greatest sum that the table can give. */
static uint64_t greatest_sum(const struct code_table *table, float scale)
{
    uint64_t sum = 0;

    for (uint32_t c = 0; c < table->chunk_count; c += WIDTHS) {
        uint32_t left = table->chunk_count - c < WIDTHS ? table->chunk_count - c : WIDTHS;
        float widths[WIDTHS];
        uint32_t part = 0; /* of so few it fits, and 32 bits are added in vectors */

        memcpy(widths, width_at(table, c), left * sizeof *widths);
        for (uint32_t i = 0; i < left; i++)
            part += rounded(widths[i] * scale);
        sum += part;
    }
    return sum;
}

/* The greatest scale at which no sum exceeds SUM_MAX. Rounding moves a sum by half a unit a chunk
 * at most, which is where the search starts and ends. */
static float greatest_scale(const struct code_table *table, double spread)
{
    double slack = table->chunk_count / 2.0 + 1, ceiling = 1.0 / FLT_MIN;
    double low = (SUM_MAX - slack) / spread, high = (SUM_MAX + slack) / spread;
    float scale;

    low = low < ceiling ? low : ceiling;
    high = high < ceiling ? high : ceiling;
    scale = (float)low;
    for (uint32_t i = 0; i < SCALE_HALVINGS; i++) {
        float middle = (float)((scale + high) / 2);

        if (greatest_sum(table, middle) <= SUM_MAX)
            scale = middle;
        else
            high = middle;
    }
    return scale;
}

/* Shares of which a difference might not fit a float. */
static void halved_entries(const float *shares, float least, float scale, uint16_t *entries)
{
    for (uint32_t i = 0; i < ENTRIES; i++)
        entries[i] = (uint16_t)rounded((shares[i] * 0.5f - least * 0.5f) * scale);
}

void code_scan_fill(struct code_table *table, const float *shares, uint32_t chunk_count,
                    const struct code_fill_passes *passes)
{
    double offset = 0, spread = 0;
    float halver = 1, scale;

    assert(chunk_count <= DISTANCE_DIM_MAX); /* what the search of the scale has room for */
    table->chunk_count = chunk_count;
    for (uint32_t c = 0; c < chunk_count; c++) {
        float least, greatest;

        passes->range(shares + (size_t)c * ENTRIES, &least, &greatest);
        memcpy(table->entries + (size_t)c * ENTRIES, &least, sizeof least);
        width_put(table, c, greatest - least);
        offset += (double)least;
        spread += (double)greatest - (double)least;
        if (greatest > FLT_MAX / 2 || least < -FLT_MAX / 2)
            halver = 0.5f;
    }
    table->offset = (float)offset;
    table->step = 0;
    if (!(spread > 0)) {
        if (chunk_count)
            memset(table->entries, 0, (size_t)chunk_count * ENTRIES * sizeof(*table->entries));
        return;
    }
    if (halver < 1) {
        for (uint32_t c = 0; c < chunk_count; c++) {
            float least, greatest;

            passes->range(shares + (size_t)c * ENTRIES, &least, &greatest);
            width_put(table, c, greatest * halver - least * halver);
        }
    }
    scale = greatest_scale(table, spread * (double)halver);
    table->step = (float)(1.0 / ((double)halver * (double)scale));
    for (uint32_t c = 0; c < chunk_count; c++) {
        void (*write)(const float *, float, float, uint16_t *) =
            halver < 1 ? halved_entries : passes->entries;

        uint16_t *entries = table->entries + (size_t)c * ENTRIES;
        float least;

        memcpy(&least, entries, sizeof least);
        write(shares + (size_t)c * ENTRIES, least, scale, entries);
    }
}

static void base_fill(struct code_table *table, const float *shares, uint32_t chunk_count)
{
    code_scan_fill(table, shares, chunk_count, &base_passes);
}

void code_table_fill(struct code_table *table, const float *shares, uint32_t chunk_count)
{
    code_scan_kernels_best()->fill(table, shares, chunk_count);
}

static inline uint16_t sum_of(const uint16_t *entries, uint32_t chunk_count, const uint8_t *code)
{
    uint32_t sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
    uint32_t c = 0;

    /* Written out: as an inner loop it becomes vectors that are filled one look-up at a time. */
    for (; c + 8 <= chunk_count; c += 8) {
        const uint16_t *at = entries + (size_t)c * ENTRIES;
        const uint8_t *eight = code + c;

        sum0 += at[eight[0]];
        sum1 += at[1 * ENTRIES + eight[1]];
        sum2 += at[2 * ENTRIES + eight[2]];
        sum3 += at[3 * ENTRIES + eight[3]];
        sum0 += at[4 * ENTRIES + eight[4]];
        sum1 += at[5 * ENTRIES + eight[5]];
        sum2 += at[6 * ENTRIES + eight[6]];
        sum3 += at[7 * ENTRIES + eight[7]];
    }
    for (; c < chunk_count; c++)
        sum0 += entries[(size_t)c * ENTRIES + code[c]];
    return (uint16_t)(sum0 + sum1 + sum2 + sum3);
}

static void scalar_spans(const uint16_t *entries, uint32_t chunk_count, const uint8_t *codes,
                         uint64_t code_stride, const struct code_span *spans, uint32_t span_count,
                         uint16_t *sums)
{
    for (uint32_t s = 0; s < span_count; s++) {
        const uint8_t *code = codes + spans[s].first * code_stride;

        for (uint32_t i = 0; i < spans[s].count; i++, code += code_stride)
            *sums++ = sum_of(entries, chunk_count, code);
    }
}

static void prefetch_code(const uint8_t *code, uint32_t chunk_count)
{
    for (uint32_t at = 0; at < chunk_count; at += CACHE_LINE)
        __builtin_prefetch(code + at);
    if (chunk_count)
        __builtin_prefetch(code + chunk_count - 1);
}

void code_scan_scalar_rows(const uint16_t *entries, uint32_t chunk_count, const uint8_t *codes,
                           uint64_t code_stride, const uint32_t *rows, uint32_t count,
                           uint16_t *sums)
{
    for (uint32_t i = 0; i < count && i < PREFETCH_ROWS; i++)
        prefetch_code(codes + rows[i] * code_stride, chunk_count);
    for (uint32_t i = 0; i < count; i++) {
        if (i + PREFETCH_ROWS < count)
            prefetch_code(codes + rows[i + PREFETCH_ROWS] * code_stride, chunk_count);
        sums[i] = sum_of(entries, chunk_count, codes + rows[i] * code_stride);
    }
}

static uint32_t scalar_below(const uint16_t *sums, uint32_t count, uint16_t limit, uint32_t *out)
{
    uint32_t found = 0;

    for (uint32_t i = 0; i < count; i++) {
        if (sums[i] <= limit)
            out[found++] = i;
    }
    return found;
}

/* The value at which the running total of counts reaches nth, which loses what came before. */
static uint32_t value_of_nth(const uint32_t counts[256], uint32_t *nth)
{
    uint32_t value = 0;

    while (counts[value] < *nth)
        *nth -= counts[value++];
    return value;
}

static uint16_t scalar_nth(const uint16_t *sums, uint32_t count, uint32_t nth)
{
    uint32_t counts[2][256]; /* by turns, so that equal bytes do not wait for each other */
    uint32_t upper;
    uint32_t i = 0;

    assert(nth >= 1 && nth <= count);
    memset(counts, 0, sizeof counts);
    for (; i + 2 <= count; i += 2) {
        counts[0][sums[i] >> 8]++;
        counts[1][sums[i + 1] >> 8]++;
    }
    if (i < count)
        counts[0][sums[i] >> 8]++;
    for (uint32_t value = 0; value < 256; value++)
        counts[0][value] += counts[1][value];
    upper = value_of_nth(counts[0], &nth);
    memset(counts[0], 0, sizeof counts[0]);
    for (i = 0; i < count; i++)
        counts[0][sums[i] & 255] += sums[i] >> 8 == upper; /* a branch was slower */
    return (uint16_t)(upper << 8 | value_of_nth(counts[0], &nth));
}

static const struct code_scan_kernels scalar_kernels = {
    .name = "scalar",
    .spans = scalar_spans,
    .rows = code_scan_scalar_rows,
    .below = scalar_below,
    .nth = scalar_nth,
    .fill = base_fill,
};

/* The same functions under the name of the set that they stand in for. */
static const struct code_scan_kernels avx2_kernels = {
    .name = "avx2",
    .spans = scalar_spans,
    .rows = code_scan_scalar_rows,
    .below = scalar_below,
    .nth = scalar_nth,
    .fill = base_fill,
};

const struct code_scan_kernels *code_scan_kernels_for(enum isa isa)
{
    if (!distance_kernels_for(isa))
        return NULL; /* its detection is ours: every set asks for the same features */
    switch (isa) {
    case ISA_SCALAR:
        return &scalar_kernels;
    case ISA_AVX2:
        return &avx2_kernels;
#if defined(__x86_64__)
    case ISA_AVX512:
        return &code_scan_avx512_kernels;
    case ISA_AVX512_VNNI:
        return &code_scan_avx512vnni_kernels;
#endif
    default:
        return NULL;
    }
}

const struct code_scan_kernels *code_scan_kernels_best(void)
{
    const struct distance_kernels *best = distance_kernels_best();

    for (int isa = ISA_COUNT - 1; isa > ISA_SCALAR; isa--) {
        if (distance_kernels_for((enum isa)isa) == best)
            return code_scan_kernels_for((enum isa)isa);
    }
    return &scalar_kernels;
}
