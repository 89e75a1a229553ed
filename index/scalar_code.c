/* Which quantiles to clamp at depends on the tails: clamping costs the few outside, not clamping
 * makes every step wider. So a handful of them is tried on a sorted sample of each dimension.
 *
 * 4-bit lookup tables are 16 floats a dimension, for the adc4 kernel. With 8 bits a table of 256 a
 * dimension would fall out of the first cache, while the arithmetic is two instructions a register:
 * the "table" then holds the query, scaled so that a code's bytes multiply into it. */
#include "index/scalar_code.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "index/code_kernels.h"
#include "index/distance.h"
#include "storage/base/bytes.h"

#define QUANTILE_SAMPLE 8192u

/* An 8-bit table: which formula, its constant, then two arrays of dim floats. */
enum { TABLE_FORM = 0, TABLE_BASE = 1, TABLE_ARRAYS = 2 };

struct scalar_code {
    uint32_t dim;
    uint32_t code_bytes;
    uint32_t top;  /* the highest level: 15 or 255 */
    float *lowest; /* dim: the value of level 0 */
    float *step;   /* dim: between levels; 0 for a constant dimension */
};

static void scalar_free(void *code)
{
    struct scalar_code *scalar = code;

    if (!scalar)
        return;
    free(scalar->lowest);
    free(scalar->step);
    free(scalar);
}

static struct scalar_code *scalar_new(uint32_t dim, uint32_t code_bytes, struct error *err)
{
    struct scalar_code *scalar = calloc(1, sizeof *scalar);

    if (!scalar)
        goto fail;
    scalar->dim = dim;
    scalar->code_bytes = code_bytes;
    scalar->top = code_bytes >= dim ? 255 : 15;
    scalar->lowest = calloc(dim, sizeof *scalar->lowest);
    scalar->step = calloc(dim, sizeof *scalar->step);
    if (!scalar->lowest || !scalar->step)
        goto fail;
    return scalar;
fail:
    scalar_free(scalar);
    error_set(err, ERR_NOMEM, "no memory for a scalar code of %u dimensions", dim);
    return NULL;
}

static const char *scalar_refuses(uint32_t dim, uint32_t code_bytes)
{
    return code_bytes < dim / 2 + dim % 2 ? "has less than 4 bits a dimension" : NULL;
}

static uint64_t scalar_train_units(uint32_t dim, uint32_t code_bytes)
{
    (void)code_bytes;
    return dim;
}

/* The level of a value; a NaN gives 0 as the comparison fails. */
static uint32_t level_of(float value, float lowest, float step, uint32_t top)
{
    float level = step > 0 ? (value - lowest) / step + 0.5f : 0;

    if (!(level > 0))
        return 0;
    return level < (float)top ? (uint32_t)level : top;
}

static int compare_floats(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;

    return (x > y) - (x < y);
}

struct scalar_training {
    struct scalar_code *scalar;
    const struct code_training *training;
    uint32_t sampled;
    float *columns; /* workers x sampled */
};

static void train_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    static const double tails[] = {0, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04};
    struct scalar_training *work = context;
    const struct code_training *training = work->training;
    struct scalar_code *scalar = work->scalar;
    float *column = work->columns + (size_t)worker * work->sampled;

    for (uint64_t d = begin; d < end; d++) {
        double least = -1;

        for (uint32_t i = 0; i < work->sampled; i++) {
            size_t row = (size_t)i * training->count / work->sampled;

            column[i] = training->sample[row * training->dim + d];
        }
        qsort(column, work->sampled, sizeof *column, compare_floats);
        for (size_t t = 0; t < sizeof tails / sizeof tails[0]; t++) {
            uint32_t cut = (uint32_t)(tails[t] * work->sampled);
            float lowest = column[cut];
            float step = (column[work->sampled - 1 - cut] - lowest) / (float)scalar->top;
            double loss = 0;

            for (uint32_t i = 0; i < work->sampled; i++) {
                uint32_t level = level_of(column[i], lowest, step, scalar->top);
                double lost = column[i] - (lowest + step * (float)level);

                loss += lost * lost;
            }
            if (least < 0 || loss < least) {
                least = loss;
                scalar->lowest[d] = lowest;
                scalar->step[d] = step;
            }
        }
    }
}

static int scalar_train(const struct code_training *training, struct pool *pool, struct job *job,
                        void **out, struct error *err)
{
    struct scalar_code *scalar = scalar_new(training->dim, training->code_bytes, err);
    struct scalar_training work = {.scalar = scalar, .training = training};
    int rc = -1;

    if (!scalar)
        return -1;
    work.sampled = training->count < QUANTILE_SAMPLE ? training->count : QUANTILE_SAMPLE;
    work.columns = malloc((size_t)pool_workers(pool) * work.sampled * sizeof *work.columns);
    if (!work.columns) {
        error_set(err, ERR_NOMEM, "no memory to train a scalar code");
        goto done;
    }
    pool_for(pool, training->dim, 4, train_range, &work);
    if (job_advance(job, training->dim, err) < 0)
        goto done;
    *out = scalar;
    scalar = NULL;
    rc = 0;
done:
    free(work.columns);
    scalar_free(scalar);
    return rc;
}

static uint64_t scalar_memory_bytes(const void *code)
{
    const struct scalar_code *scalar = code;

    return sizeof *scalar + 2ull * scalar->dim * sizeof(float);
}

static size_t scalar_encode_scratch_floats(const void *code)
{
    (void)code;
    return 0;
}

static void scalar_encode_block(const void *code, const float *vectors, uint32_t count,
                                float *scratch, uint8_t *codes, float *errors)
{
    const struct scalar_code *scalar = code;
    bool nibbles = scalar->top == 15;

    (void)scratch;
    for (uint32_t i = 0; i < count; i++) {
        const float *vector = vectors + (size_t)i * scalar->dim;
        uint8_t *bytes = codes + (size_t)i * scalar->code_bytes;
        float error = 0;

        memset(bytes, 0, scalar->code_bytes);
        for (uint32_t d = 0; d < scalar->dim; d++) {
            uint32_t level = level_of(vector[d], scalar->lowest[d], scalar->step[d], scalar->top);
            float lost = vector[d] - (scalar->lowest[d] + scalar->step[d] * (float)level);

            error += lost * lost;
            if (nibbles)
                bytes[d / 2] |= (uint8_t)(level << (4 * (d % 2)));
            else
                bytes[d] = (uint8_t)level;
        }
        if (errors)
            errors[i] = error;
    }
}

static void scalar_decode(const void *code, const uint8_t *bytes, float *vector)
{
    const struct scalar_code *scalar = code;

    for (uint32_t d = 0; d < scalar->dim; d++) {
        uint32_t level = scalar->top == 15 ? bytes[d / 2] >> (4 * (d % 2)) & 15 : bytes[d];

        vector[d] = scalar->lowest[d] + scalar->step[d] * (float)level;
    }
}

static size_t scalar_table_floats(const void *code)
{
    const struct scalar_code *scalar = code;

    return scalar->top == 15 ? 16u * (size_t)scalar->dim : TABLE_ARRAYS + 2u * (size_t)scalar->dim;
}

static size_t scalar_scratch_floats(const void *code)
{
    (void)code;
    return 0;
}

static void table_of_nibbles(const struct scalar_code *scalar, enum metric metric,
                             const float *query, float *table)
{
    for (uint32_t d = 0; d < scalar->dim; d++) {
        for (uint32_t level = 0; level < 16; level++) {
            float value = scalar->lowest[d] + scalar->step[d] * (float)level;
            float diff = query[d] - value;

            table[(size_t)d * 16 + level] = metric == METRIC_L2 ? diff * diff : -query[d] * value;
        }
    }
}

static void scalar_table(const void *code, enum metric metric, const float *query, float *scratch,
                         float *table)
{
    const struct scalar_code *scalar = code;
    float *first = table + TABLE_ARRAYS;
    float *second = first + scalar->dim;
    float base = 0;

    (void)scratch;
    if (scalar->top == 15) {
        table_of_nibbles(scalar, metric, query, table);
        return;
    }
    for (uint32_t d = 0; d < scalar->dim; d++) {
        if (metric == METRIC_L2) {
            first[d] = query[d] - scalar->lowest[d];
            second[d] = scalar->step[d];
        } else {
            base -= query[d] * scalar->lowest[d];
            first[d] = 0;
            second[d] = -query[d] * scalar->step[d];
        }
    }
    table[TABLE_FORM] = metric == METRIC_L2 ? 0.0f : 1.0f;
    table[TABLE_BASE] = base;
}

static void scalar_estimate(const void *code, const float *table, const uint8_t *codes,
                            const uint32_t *rows, uint32_t count, float *out)
{
    const struct scalar_code *scalar = code;
    const struct code_kernels *kernels = code_kernels_best();
    uint32_t dim = scalar->dim;
    const float *first = table + TABLE_ARRAYS;
    const float *second = first + dim;

    if (scalar->top == 15) {
        distance_kernels_best()->adc4_rows(table, dim, codes, scalar->code_bytes, rows, count, out);
        return;
    }
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *bytes = codes + (size_t)rows[i] * scalar->code_bytes;

        out[i] = table[TABLE_FORM] == 0
                     ? kernels->l2_bytes(first, second, bytes, dim)
                     : table[TABLE_BASE] + kernels->dot_bytes(second, bytes, dim);
    }
}

static uint64_t scalar_stored_floats(uint32_t dim, uint32_t code_bytes)
{
    (void)code_bytes;
    return 2ull * dim;
}

/* All lowest values, then all steps. */
static void scalar_write(const void *code, uint8_t *bytes)
{
    const struct scalar_code *scalar = code;

    for (uint32_t d = 0; d < scalar->dim; d++) {
        store_f32(bytes + 4ull * d, scalar->lowest[d]);
        store_f32(bytes + 4ull * (scalar->dim + d), scalar->step[d]);
    }
}

static int scalar_read(const uint8_t *bytes, uint32_t dim, uint32_t code_bytes, void **out,
                       struct error *err)
{
    struct scalar_code *scalar = scalar_new(dim, code_bytes, err);

    if (!scalar)
        return -1;
    for (uint32_t d = 0; d < dim; d++) {
        scalar->lowest[d] = load_f32(bytes + 4ull * d);
        scalar->step[d] = load_f32(bytes + 4ull * (dim + d));
    }
    *out = scalar;
    return 0;
}

const struct code_methods scalar_code_methods = {
    .kind = CODE_SCALAR,
    .name = "scalar",
    .refuses = scalar_refuses,
    .train_units = scalar_train_units,
    .train = scalar_train,
    .free = scalar_free,
    .memory_bytes = scalar_memory_bytes,
    .encode_scratch_floats = scalar_encode_scratch_floats,
    .encode_block = scalar_encode_block,
    .decode = scalar_decode,
    .table_floats = scalar_table_floats,
    .scratch_floats = scalar_scratch_floats,
    .table = scalar_table,
    .estimate = scalar_estimate,
    .stored_floats = scalar_stored_floats,
    .write = scalar_write,
    .read = scalar_read,
};
