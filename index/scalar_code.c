/* Which quantiles to clamp at depends on the tails: clamping costs the few outside, not clamping
 * makes every step wider. So a handful of them is tried on a sorted sample of each dimension.
 *
 * A byte's shares are those of a dimension's 256 levels, or of a pair of dimensions' 16 levels:
 * the pair's shares are sums of two, so the tables of 4 bits cost an addition an entry. */
#include "index/scalar_code.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define QUANTILE_SAMPLE 8192u

struct scalar_code {
    uint32_t dim;
    uint32_t chunk_count;
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

static struct scalar_code *scalar_new(uint32_t dim, uint32_t chunk_count, struct error *err)
{
    struct scalar_code *scalar = calloc(1, sizeof *scalar);

    if (!scalar)
        goto fail;
    scalar->dim = dim;
    scalar->chunk_count = chunk_count;
    scalar->top = chunk_count == dim ? 255 : 15;
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

static const char *scalar_refuses(uint32_t dim, uint32_t chunk_count)
{
    return chunk_count != dim && chunk_count != dim / 2 + dim % 2
               ? "has neither 4 nor 8 bits a dimension"
               : NULL;
}

static uint64_t scalar_train_units(const struct code_training *training)
{
    return training->dim;
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
    struct scalar_code *scalar = scalar_new(training->dim, training->chunk_count, err);
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
                                float *scratch, uint8_t *codes, uint64_t code_stride, float *errors)
{
    const struct scalar_code *scalar = code;
    bool nibbles = scalar->top == 15;

    (void)scratch;
    for (uint32_t i = 0; i < count; i++) {
        const float *vector = vectors + (size_t)i * scalar->dim;
        uint8_t *bytes = codes + i * code_stride;
        float error = 0;

        memset(bytes, 0, scalar->chunk_count);
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

static size_t scalar_scratch_floats(const void *code)
{
    (void)code;
    return 0;
}

/* Shares of the levels of one dimension. */
static void level_shares(const struct scalar_code *scalar, uint32_t d, enum metric metric,
                         float number, float *shares)
{
    float lowest = scalar->lowest[d], step = scalar->step[d];

    for (uint32_t level = 0; level <= scalar->top; level++) {
        float value = lowest + step * (float)level;
        float diff = number - value;

        shares[level] = metric == METRIC_L2 ? diff * diff : -number * value;
    }
}

static void scalar_table(const void *code, enum metric metric, const float *query, float *scratch,
                         float *shares)
{
    const struct scalar_code *scalar = code;

    (void)scratch;
    for (uint32_t c = 0; c < scalar->chunk_count; c++, shares += CODE_VALUES) {
        float low[16], high[16] = {0}; /* past an odd last dimension nothing is added */

        if (scalar->top == 255) {
            level_shares(scalar, c, metric, query[c], shares);
            continue;
        }
        level_shares(scalar, 2 * c, metric, query[2 * c], low);
        if (2 * c + 1 < scalar->dim)
            level_shares(scalar, 2 * c + 1, metric, query[2 * c + 1], high);
        for (uint32_t h = 0; h < 16; h++) {
            for (uint32_t l = 0; l < 16; l++)
                shares[16 * h + l] = high[h] + low[l];
        }
    }
}

static uint64_t scalar_stored_bytes(uint32_t dim, uint32_t chunk_count)
{
    (void)chunk_count;
    return 2ull * dim * sizeof(float);
}

/* All lowest values, then all steps. */
static void scalar_write(const void *code, uint8_t *bytes)
{
    const struct scalar_code *scalar = code;

    code_write_floats(bytes, scalar->lowest, scalar->dim);
    code_write_floats(bytes + scalar->dim * sizeof(float), scalar->step, scalar->dim);
}

static int scalar_read(const uint8_t *bytes, uint32_t dim, uint32_t chunk_count, void **out,
                       struct error *err)
{
    struct scalar_code *scalar = scalar_new(dim, chunk_count, err);

    if (!scalar)
        return -1;
    if (code_read_floats(bytes, dim, "lowest value", scalar->lowest, err) < 0 ||
        code_read_floats(bytes + dim * sizeof(float), dim, "step", scalar->step, err) < 0) {
        scalar_free(scalar);
        return -1;
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
    .scratch_floats = scalar_scratch_floats,
    .table = scalar_table,
    .stored_bytes = scalar_stored_bytes,
    .write = scalar_write,
    .read = scalar_read,
};
