/* The covariance is computed in tiles, one GEMM over all centred rows each, so that a tile's bytes
 * depend on nothing else; its eigenvectors in double. Axes are dealt by falling variance: each goes
 * to the chunk with room whose product of variances is least. The rotation has a row an input
 * dimension: encoding multiplies by it as it stands, and a query's rotation adds up rows, which are
 * dense, instead of many short dot products. Lengths and angles do not change, so pq's tables on
 * the rotated query estimate distances of the original space.
 *
 * A query streams the whole matrix, so it is kept as half floats: of 512 dimensions it then fits
 * the second cache. What that rounding changes of a length is some 10^-5 of it, and the same for
 * query and code, since training and encoding widen the rounded matrix. */
#include "index/opq.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/code_kernels.h"
#include "index/distance.h"
#include "index/gemm.h"
#include "index/pq.h"
#include "storage/base/bytes.h"

#define COVARIANCE_TILE 128u
#define ROTATE_ROWS 512u
#define PANEL_ROWS 128u /* of the matrix, widened at a time */

static_assert(OPQ_DIM_MAX == 4096, "opq_refuses spells the number");

struct opq {
    uint32_t dim;
    uint32_t stride;    /* dim rounded up to CODE_LANES */
    uint16_t *rotation; /* dim x stride halves: row d is what input d adds to the outputs */
    void *pq;           /* of pq_methods, on rotated vectors */
};

static void opq_free(void *code)
{
    struct opq *opq = code;

    if (!opq)
        return;
    pq_methods.free(opq->pq);
    free(opq->rotation);
    free(opq);
}

static struct opq *opq_new(uint32_t dim, struct error *err)
{
    struct opq *opq = calloc(1, sizeof *opq);

    if (!opq)
        goto fail;
    opq->dim = dim;
    opq->stride = (dim + CODE_LANES - 1) / CODE_LANES * CODE_LANES;
    opq->rotation = calloc((size_t)dim * opq->stride, sizeof *opq->rotation);
    if (!opq->rotation)
        goto fail;
    return opq;
fail:
    opq_free(opq);
    error_set(err, ERR_NOMEM, "no memory for a rotation of %u dimensions", dim);
    return NULL;
}

static const char *opq_refuses(uint32_t dim, uint32_t chunk_count)
{
    if (dim > OPQ_DIM_MAX)
        return "has more dimensions than opq rotates (4096)";
    return pq_methods.refuses(dim, chunk_count);
}

static uint64_t opq_train_units(const struct code_training *training)
{
    return pq_methods.train_units(training);
}

static size_t panel_floats(const struct opq *opq)
{
    uint32_t rows = opq->dim < PANEL_ROWS ? opq->dim : PANEL_ROWS;

    return (size_t)rows * opq->stride;
}

/* out = vectors times the rotation, both count x dim; panel: panel_floats. */
static void rotate(const struct opq *opq, const float *vectors, uint64_t count, float *panel,
                   float *out)
{
    uint32_t dim = opq->dim;

    for (uint32_t d = 0; d < dim; d += PANEL_ROWS) {
        uint32_t rows = dim - d < PANEL_ROWS ? dim - d : PANEL_ROWS;

        distance_kernels_best()->f32_from_f16(opq->rotation + (size_t)d * opq->stride, panel,
                                              (uint64_t)rows * opq->stride);
        gemm_f32(false, false, count, dim, rows, 1.0f, vectors + d, dim, panel, opq->stride,
                 d ? 1.0f : 0.0f, out, dim);
    }
}

/* Rows as the loops of one training see them. */
struct rotate_work {
    const struct opq *opq;
    const float *sample; /* count x dim */
    uint32_t count;
    const double *mean; /* dim */
    float *rows;        /* count x dim: first centred, then rotated */
    float *covariance;  /* dim x dim, upper tiles filled */
    float *panels;      /* workers x panel_floats */
};

static void centre_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct rotate_work *work = context;
    uint32_t dim = work->opq->dim;

    (void)worker;
    for (uint64_t i = begin; i < end; i++) {
        for (uint32_t d = 0; d < dim; d++)
            work->rows[i * dim + d] = (float)(work->sample[i * dim + d] - work->mean[d]);
    }
}

static void covariance_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct rotate_work *work = context;
    uint32_t dim = work->opq->dim;
    uint32_t tiles = (dim + COVARIANCE_TILE - 1) / COVARIANCE_TILE;

    (void)worker;
    for (uint64_t tile = begin; tile < end; tile++) {
        uint32_t i = (uint32_t)(tile / tiles) * COVARIANCE_TILE;
        uint32_t j = (uint32_t)(tile % tiles) * COVARIANCE_TILE;
        uint32_t height = dim - i < COVARIANCE_TILE ? dim - i : COVARIANCE_TILE;
        uint32_t width = dim - j < COVARIANCE_TILE ? dim - j : COVARIANCE_TILE;

        if (j < i)
            continue; /* mirrored later */
        gemm_f32(true, false, height, width, work->count, 1.0f / (float)work->count, work->rows + i,
                 dim, work->rows + j, dim, 0.0f, work->covariance + (size_t)i * dim + j, dim);
    }
}

static void rotate_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct rotate_work *work = context;
    uint32_t dim = work->opq->dim;

    rotate(work->opq, work->sample + begin * dim, end - begin,
           work->panels + worker * panel_floats(work->opq), work->rows + begin * dim);
}

/* Deals axes to the rotated dimensions: place[e] is where the axis of values[e] (ascending) goes.
 */
static int deal_axes(const double *values, uint32_t dim, uint32_t chunk_count, uint32_t *place,
                     struct error *err)
{
    double floor_value = values[dim - 1] * 1e-12 > DBL_MIN ? values[dim - 1] * 1e-12 : DBL_MIN;
    double *products = calloc(chunk_count, sizeof *products); /* as logarithms */
    uint32_t *filled = calloc(chunk_count, sizeof *filled);
    int rc = -1;

    if (!products || !filled) {
        error_set(err, ERR_NOMEM, "no memory to deal %u axes", dim);
        goto done;
    }
    for (uint32_t e = dim; e-- > 0;) {
        double value = values[e] > floor_value ? values[e] : floor_value;
        uint32_t chosen = chunk_count;

        for (uint32_t c = 0; c < chunk_count; c++) {
            uint32_t room =
                pq_chunk_begin(dim, chunk_count, c + 1) - pq_chunk_begin(dim, chunk_count, c);

            if (filled[c] < room && (chosen == chunk_count || products[c] < products[chosen]))
                chosen = c;
        }
        place[e] = pq_chunk_begin(dim, chunk_count, chosen) + filled[chosen]++;
        /* Relative to the floor every factor is at least one: a product grows with each axis. */
        products[chosen] += log(value / floor_value);
    }
    rc = 0;
done:
    free(products);
    free(filled);
    return rc;
}

static int learn_rotation(struct opq *opq, uint32_t chunk_count, const float *covariance,
                          struct error *err)
{
    uint32_t dim = opq->dim;
    double *axes = malloc((size_t)dim * dim * sizeof *axes);
    double *values = malloc(dim * sizeof *values);
    uint32_t *place = malloc(dim * sizeof *place);
    float *rotation = calloc((size_t)dim * opq->stride, sizeof *rotation);
    int rc = -1;

    if (!axes || !values || !place || !rotation) {
        error_set(err, ERR_NOMEM, "no memory for the axes of %u dimensions", dim);
        goto done;
    }
    for (uint32_t i = 0; i < dim; i++) {
        for (uint32_t j = i; j < dim; j++)
            axes[(size_t)i * dim + j] = axes[(size_t)j * dim + i] = covariance[(size_t)i * dim + j];
    }
    if (gemm_eigen_symmetric(axes, dim, values, err) < 0 ||
        deal_axes(values, dim, chunk_count, place, err) < 0)
        goto done;
    for (uint32_t e = 0; e < dim; e++) {
        for (uint32_t d = 0; d < dim; d++)
            rotation[(size_t)d * opq->stride + place[e]] = (float)axes[(size_t)e * dim + d];
    }
    distance_kernels_best()->f16_from_f32(rotation, opq->rotation, (uint64_t)dim * opq->stride);
    rc = 0;
done:
    free(axes);
    free(values);
    free(place);
    free(rotation);
    return rc;
}

static int opq_train(const struct code_training *training, struct pool *pool, struct job *job,
                     void **out, struct error *err)
{
    uint32_t dim = training->dim;
    uint32_t tiles = (dim + COVARIANCE_TILE - 1) / COVARIANCE_TILE;
    struct opq *opq = opq_new(dim, err);
    double *mean = calloc(dim, sizeof *mean);
    float *rows = malloc((size_t)training->count * dim * sizeof *rows);
    float *covariance = malloc((size_t)dim * dim * sizeof *covariance);
    struct rotate_work work = {opq, training->sample, training->count, mean, rows, covariance,
                               NULL};
    struct code_training rotated = *training;
    int rc = -1;

    if (!opq)
        goto done;
    work.panels = malloc(pool_workers(pool) * panel_floats(opq) * sizeof *work.panels);
    if (!mean || !rows || !covariance || !work.panels) {
        error_set(err, ERR_NOMEM, "no memory to rotate %u vectors of %u dimensions",
                  training->count, dim);
        goto done;
    }
    for (size_t i = 0; i < training->count; i++) {
        for (uint32_t d = 0; d < dim; d++)
            mean[d] += training->sample[i * dim + d];
    }
    for (uint32_t d = 0; d < dim; d++)
        mean[d] /= training->count;
    pool_for(pool, training->count, 1024, centre_range, &work);
    pool_for(pool, (uint64_t)tiles * tiles, 1, covariance_range, &work);
    if (job_advance(job, 0, err) < 0 ||
        learn_rotation(opq, training->chunk_count, covariance, err) < 0)
        goto done;
    pool_for(pool, training->count, ROTATE_ROWS, rotate_range, &work);
    rotated.sample = rows;
    if (pq_methods.train(&rotated, pool, job, &opq->pq, err) < 0)
        goto done;
    *out = opq;
    opq = NULL;
    rc = 0;
done:
    free(mean);
    free(rows);
    free(covariance);
    free(work.panels);
    opq_free(opq);
    return rc;
}

static uint64_t opq_memory_bytes(const void *code)
{
    const struct opq *opq = code;

    return sizeof *opq + (uint64_t)opq->dim * opq->stride * sizeof *opq->rotation +
           pq_methods.memory_bytes(opq->pq);
}

static size_t opq_encode_scratch_floats(const void *code)
{
    const struct opq *opq = code;

    return (size_t)CODE_BLOCK * opq->dim + panel_floats(opq) +
           pq_methods.encode_scratch_floats(opq->pq);
}

static void opq_encode_block(const void *code, const float *vectors, uint32_t count, float *scratch,
                             uint8_t *codes, uint64_t code_stride, float *errors)
{
    const struct opq *opq = code;
    float *panel = scratch + (size_t)CODE_BLOCK * opq->dim;

    rotate(opq, vectors, count, panel, scratch);
    pq_methods.encode_block(opq->pq, scratch, count, panel + panel_floats(opq), codes, code_stride,
                            errors);
}

static void opq_decode(const void *code, const uint8_t *bytes, float *vector)
{
    const struct opq *opq = code;
    float rotated[OPQ_DIM_MAX];

    pq_methods.decode(opq->pq, bytes, rotated);
    for (uint32_t d = 0; d < opq->dim; d++)
        vector[d] = distance_kernels_best()->ip_f32_f16(
            rotated, opq->rotation + (size_t)d * opq->stride, opq->dim);
}

static size_t opq_scratch_floats(const void *code)
{
    const struct opq *opq = code;

    return opq->stride + pq_methods.scratch_floats(opq->pq);
}

static void opq_table(const void *code, enum metric metric, const float *query, float *scratch,
                      float *shares)
{
    const struct opq *opq = code;

    code_kernels_best()->dot_halves(query, opq->dim, opq->rotation, opq->stride, opq->stride, 0.0f,
                                    1.0f, scratch);
    pq_methods.table(opq->pq, metric, scratch, scratch + opq->stride, shares);
}

static uint64_t opq_stored_bytes(uint32_t dim, uint32_t chunk_count)
{
    return sizeof(uint16_t) * (uint64_t)dim * dim + pq_methods.stored_bytes(dim, chunk_count);
}

/* The rotation, dim x dim without padding, then pq. */
static void opq_write(const void *code, uint8_t *bytes)
{
    const struct opq *opq = code;
    size_t row_bytes = opq->dim * sizeof(uint16_t);

    for (uint32_t d = 0; d < opq->dim; d++, bytes += row_bytes)
        code_write_halves(bytes, opq->rotation + (size_t)d * opq->stride, opq->dim);
    pq_methods.write(opq->pq, bytes);
}

static int opq_read(const uint8_t *bytes, uint32_t dim, uint32_t chunk_count, void **out,
                    struct error *err)
{
    struct opq *opq = opq_new(dim, err);
    size_t row_bytes = dim * sizeof(uint16_t);

    if (!opq)
        return -1;
    for (uint32_t d = 0; d < dim; d++, bytes += row_bytes) {
        if (code_read_halves(bytes, dim, "rotation", opq->rotation + (size_t)d * opq->stride, err) <
            0)
            goto fail;
    }
    if (pq_methods.read(bytes, dim, chunk_count, &opq->pq, err) < 0)
        goto fail;
    *out = opq;
    return 0;
fail:
    opq_free(opq);
    return -1;
}

const struct code_methods opq_methods = {
    .kind = CODE_OPQ,
    .name = "opq",
    .refuses = opq_refuses,
    .train_units = opq_train_units,
    .train = opq_train,
    .free = opq_free,
    .memory_bytes = opq_memory_bytes,
    .encode_scratch_floats = opq_encode_scratch_floats,
    .encode_block = opq_encode_block,
    .decode = opq_decode,
    .scratch_floats = opq_scratch_floats,
    .table = opq_table,
    .stored_bytes = opq_stored_bytes,
    .write = opq_write,
    .read = opq_read,
};
