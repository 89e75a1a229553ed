/* How it works: the scalar kernels take one code at a time and add in four partial sums, so that
 * the look-ups of a code overlap; byte loads were faster than taking a longer load apart. Sums are
 * kept to 16 bits, so any order of adding gives the same. There is no AVX2 version: its gathers are
 * no faster than plain loads, and the 256 entries of a byte would fill all sixteen of its registers
 * twice over.
 *
 * A query's table is put on the integer scale with arithmetic that compilers turn into vectors on
 * any machine: a number below 2^22 added to 1.5 * 2^23 leaves, in the low bits of the sum, that
 * number rounded to the nearest integer. The greatest entry of a chunk is computed just as the
 * entries are, so their total, the greatest sum, is known before any entry is written. Until then
 * a chunk's least and greatest share stand where its entries will. */
#include "index/code_scan.h"

#include <assert.h>
#include <float.h>
#include <stddef.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define ENTRIES 256u
#define SUM_MAX 65535u
#define ROUNDER 12582912.0f /* 1.5 * 2^23 */
#define ROUNDER_BITS 0x4b400000u
#define SCALE_HALVINGS 10u /* of an interval of a percent or less */
#define PREFETCH_ROWS 8u   /* how far ahead */
#define CACHE_LINE 64u

struct range {
    float least, greatest;
};

#if defined(__SSE2__)
/* By hand: compilers leave the loop below to single floats, which doubles the time of a fill. */
static struct range range_of(const float *shares)
{
    __m128 least[4], greatest[4];
    float lanes[2][4];
    struct range range;

    for (uint32_t v = 0; v < 4; v++)
        least[v] = greatest[v] = _mm_loadu_ps(shares + 4 * v);
    for (uint32_t i = 16; i < ENTRIES; i += 16) {
        for (uint32_t v = 0; v < 4; v++) {
            __m128 four = _mm_loadu_ps(shares + i + 4 * v);

            least[v] = _mm_min_ps(least[v], four);
            greatest[v] = _mm_max_ps(greatest[v], four);
        }
    }
    _mm_storeu_ps(lanes[0],
                  _mm_min_ps(_mm_min_ps(least[0], least[1]), _mm_min_ps(least[2], least[3])));
    _mm_storeu_ps(lanes[1], _mm_max_ps(_mm_max_ps(greatest[0], greatest[1]),
                                       _mm_max_ps(greatest[2], greatest[3])));
    range.least = lanes[0][0];
    range.greatest = lanes[1][0];
    for (uint32_t l = 1; l < 4; l++) {
        range.least = lanes[0][l] < range.least ? lanes[0][l] : range.least;
        range.greatest = lanes[1][l] > range.greatest ? lanes[1][l] : range.greatest;
    }
    return range;
}
#else
static struct range range_of(const float *shares)
{
    struct range range = {shares[0], shares[0]};

    for (uint32_t i = 1; i < ENTRIES; i++) {
        range.least = shares[i] < range.least ? shares[i] : range.least;
        range.greatest = shares[i] > range.greatest ? shares[i] : range.greatest;
    }
    return range;
}
#endif

static void range_put(const struct code_table *table, uint32_t c, struct range range)
{
    memcpy(table->entries + (size_t)c * ENTRIES, &range, sizeof range);
}

static struct range range_get(const struct code_table *table, uint32_t c)
{
    struct range range;

    memcpy(&range, table->entries + (size_t)c * ENTRIES, sizeof range);
    return range;
}

/* halver is 1, or 1/2 where a difference of shares might not fit a float. */
static inline uint32_t entry_of(float share, float least, float halver, float scale)
{
    float rounded = (share * halver - least * halver) * scale + ROUNDER;
    uint32_t bits;

    memcpy(&bits, &rounded, sizeof bits);
    return bits - ROUNDER_BITS;
}

static uint64_t greatest_sum(const struct code_table *table, float halver, float scale)
{
    uint64_t sum = 0;

    for (uint32_t c = 0; c < table->chunk_count; c++) {
        struct range range = range_get(table, c);

        sum += entry_of(range.greatest, range.least, halver, scale);
    }
    return sum;
}

/* The greatest scale at which no sum exceeds SUM_MAX. Rounding moves a sum by half a unit a chunk
 * at most, which is where the search starts and ends. */
static float greatest_scale(const struct code_table *table, float halver, double spread)
{
    double slack = table->chunk_count / 2.0 + 1, ceiling = 1.0 / FLT_MIN;
    double low = (SUM_MAX - slack) / spread, high = (SUM_MAX + slack) / spread;
    float scale;

    low = low < ceiling ? low : ceiling;
    high = high < ceiling ? high : ceiling;
    scale = (float)low;
    for (uint32_t i = 0; i < SCALE_HALVINGS; i++) {
        float middle = (float)((scale + high) / 2);

        if (greatest_sum(table, halver, middle) <= SUM_MAX)
            scale = middle;
        else
            high = middle;
    }
    return scale;
}

void code_table_fill(struct code_table *table, const float *shares, uint32_t chunk_count)
{
    double offset = 0, spread = 0;
    float halver = 1, scale;

    assert(chunk_count <= DISTANCE_DIM_MAX); /* what the search of the scale has room for */
    table->chunk_count = chunk_count;
    for (uint32_t c = 0; c < chunk_count; c++) {
        struct range range = range_of(shares + (size_t)c * ENTRIES);

        range_put(table, c, range);
        offset += (double)range.least;
        spread += (double)range.greatest - (double)range.least;
        if (range.greatest > FLT_MAX / 2 || range.least < -FLT_MAX / 2)
            halver = 0.5f;
    }
    table->offset = (float)offset;
    table->step = 0;
    if (!(spread > 0)) {
        if (chunk_count)
            memset(table->entries, 0, (size_t)chunk_count * ENTRIES * sizeof(*table->entries));
        return;
    }
    scale = greatest_scale(table, halver, spread * (double)halver);
    table->step = (float)(1.0 / ((double)halver * (double)scale));
    for (uint32_t c = 0; c < chunk_count; c++) {
        const float *chunk = shares + (size_t)c * ENTRIES;
        uint16_t *entries = table->entries + (size_t)c * ENTRIES;
        float least = range_get(table, c).least;

        for (uint32_t i = 0; i < ENTRIES; i++)
            entries[i] = (uint16_t)entry_of(chunk[i], least, halver, scale);
    }
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

static void scalar_run(const uint16_t *entries, uint32_t chunk_count, const uint8_t *codes,
                       uint64_t code_stride, uint64_t first, uint32_t count, uint16_t *sums)
{
    const uint8_t *code = codes + first * code_stride;

    for (uint32_t i = 0; i < count; i++, code += code_stride)
        sums[i] = sum_of(entries, chunk_count, code);
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

static const struct code_scan_kernels scalar_kernels = {
    .name = "scalar",
    .run = scalar_run,
    .rows = code_scan_scalar_rows,
    .below = scalar_below,
};

/* The same functions under the name of the set that they stand in for. */
static const struct code_scan_kernels avx2_kernels = {
    .name = "avx2",
    .run = scalar_run,
    .rows = code_scan_scalar_rows,
    .below = scalar_below,
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
