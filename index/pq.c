/* Each chunk is a k-means of its own. Its centroids are kept relative to their mean, one column
 * each: the layout serves lookup tables (distances to all columns at once) and encoding (nearest
 * column). They are half floats times a power of two of the chunk, so that the greatest is just
 * below one: a rounding of at most 2^-12 of a centroid, a millionth of the distortion there is, for
 * half the bytes a query has to stream. Encoding widens a chunk's columns once for a block of
 * vectors; it and the tables see the same rounded centroids. Of an inner product the mean's share
 * is the same for all centroids of a chunk and goes into each of its shares. */
#include "index/pq.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "index/code_kernels.h"
#include "index/distance.h"
#include "index/kmeans.h"
#include "storage/base/bytes.h"

#define HALF_MAX 65504.0f

struct pq {
    uint32_t dim;
    uint32_t chunk_count;
    float *mean;       /* dim: of each chunk's centroids */
    float *scale;      /* chunk_count: what a column's numbers are multiplied by */
    uint16_t *columns; /* dim x PQ_CENTROIDS halves, chunk after chunk */
};

uint32_t pq_chunk_begin(uint32_t dim, uint32_t chunk_count, uint32_t chunk)
{
    uint32_t longer = dim % chunk_count;

    return chunk * (dim / chunk_count) + (chunk < longer ? chunk : longer);
}

static uint32_t chunk_begin(const struct pq *pq, uint32_t chunk)
{
    return pq_chunk_begin(pq->dim, pq->chunk_count, chunk);
}

static uint32_t chunk_dim_max(const struct pq *pq)
{
    return chunk_begin(pq, 1); /* the first chunk is the longest */
}

static const uint16_t *chunk_columns(const struct pq *pq, uint32_t chunk)
{
    return pq->columns + (size_t)chunk_begin(pq, chunk) * PQ_CENTROIDS;
}

static void pq_free(void *code)
{
    struct pq *pq = code;

    if (!pq)
        return;
    free(pq->mean);
    free(pq->scale);
    free(pq->columns);
    free(pq);
}

static struct pq *pq_new(uint32_t dim, uint32_t chunk_count, struct error *err)
{
    struct pq *pq = calloc(1, sizeof *pq);

    if (!pq)
        goto fail;
    pq->dim = dim;
    pq->chunk_count = chunk_count;
    pq->mean = calloc(dim, sizeof *pq->mean);
    pq->scale = calloc(chunk_count, sizeof *pq->scale);
    pq->columns = calloc((size_t)dim * PQ_CENTROIDS, sizeof *pq->columns);
    if (!pq->mean || !pq->scale || !pq->columns)
        goto fail;
    return pq;
fail:
    pq_free(pq);
    error_set(err, ERR_NOMEM, "no memory for a product quantiser of %u chunks", chunk_count);
    return NULL;
}

static const char *pq_refuses(uint32_t dim, uint32_t chunk_count)
{
    return chunk_count > dim ? "has more bytes than dimensions" : NULL;
}

static uint64_t pq_train_units(const struct code_training *training)
{
    return (uint64_t)training->chunk_count * training->iterations;
}

/* Takes a chunk's centroids over, rounded. */
static void keep_centroids(struct pq *pq, uint32_t chunk, struct centroid_table *table)
{
    size_t count = (size_t)table->dim * PQ_CENTROIDS;
    uint32_t begin = chunk_begin(pq, chunk);
    float greatest = 0;
    int exponent = 0;

    for (size_t i = 0; i < count; i++) {
        float size = fabsf(table->columns[i]);

        greatest = size > greatest ? size : greatest;
    }
    if (greatest >= FLT_MIN && isfinite(greatest))
        frexpf(greatest, &exponent);
    /* Away from the ends of a float's range, where the scale or its inverse would be lost. */
    exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
    pq->scale[chunk] = ldexpf(1.0f, exponent);
    for (size_t i = 0; i < count; i++)
        table->columns[i] = ldexpf(table->columns[i], -exponent);
    memcpy(pq->mean + begin, table->mean, table->dim * sizeof *pq->mean);
    distance_kernels_best()->f16_from_f32(table->columns,
                                          pq->columns + (size_t)begin * PQ_CENTROIDS, count);
}

/* What the chunks' trainings share. */
struct chunks_work {
    const struct code_training *training;
    struct pq *pq;
    struct pool *pool; /* for the loops within a chunk, or NULL */
    struct job *job;
    float *points;    /* workers x count x chunk_dim_max */
    float *centroids; /* workers x PQ_CENTROIDS x chunk_dim_max */
    atomic_bool failed;
    struct error *err; /* of the first to fail */
};

static int train_chunk(const struct chunks_work *work, uint32_t chunk, float *points,
                       float *centroids, struct error *err)
{
    const struct code_training *training = work->training;
    uint32_t begin = chunk_begin(work->pq, chunk);
    uint32_t chunk_dim = chunk_begin(work->pq, chunk + 1) - begin;
    struct centroid_table table;
    struct kmeans_params params = {
        .points = points,
        .stride = chunk_dim,
        .count = training->count,
        .dim = chunk_dim,
        .cluster_count = PQ_CENTROIDS,
        .iterations = training->iterations,
        .seed = training->seed,
        .stream = chunk,
    };

    /* Dense, the chunk stays in the second cache for all the steps. */
    for (uint32_t i = 0; i < training->count; i++)
        memcpy(points + (size_t)i * chunk_dim, training->sample + (size_t)i * training->dim + begin,
               chunk_dim * sizeof *points);
    if (kmeans_train(&params, work->pool, work->job, centroids, err) < 0 ||
        centroid_table_init(&table, centroids, PQ_CENTROIDS, chunk_dim, err) < 0)
        return -1;
    keep_centroids(work->pq, chunk, &table);
    centroid_table_release(&table);
    return 0;
}

static void chunks_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct chunks_work *work = context;
    size_t chunk_dim = chunk_dim_max(work->pq);
    float *points = work->points + worker * work->training->count * chunk_dim;
    float *centroids = work->centroids + worker * PQ_CENTROIDS * chunk_dim;

    for (uint64_t c = begin; c < end && !atomic_load(&work->failed); c++) {
        struct error err = ERROR_INIT;

        if (train_chunk(work, (uint32_t)c, points, centroids, &err) < 0 &&
            !atomic_exchange(&work->failed, true))
            *work->err = err;
    }
}

/* A chunk's steps are short loops, and its seeding is none: where there are enough chunks for all
 * workers, each takes whole ones. */
static int pq_train(const struct code_training *training, struct pool *pool, struct job *job,
                    void **out, struct error *err)
{
    uint32_t chunk_count = training->chunk_count;
    bool whole_chunks = chunk_count / 2 >= pool_workers(pool);
    uint32_t workers = whole_chunks ? pool_workers(pool) : 1;
    struct pq *pq = pq_new(training->dim, chunk_count, err);
    struct chunks_work work = {
        .training = training,
        .pq = pq,
        .pool = whole_chunks ? NULL : pool,
        .job = job,
        .err = err,
    };
    int rc = -1;

    if (!pq)
        return -1;
    work.points =
        malloc((size_t)workers * training->count * chunk_dim_max(pq) * sizeof *work.points);
    work.centroids =
        malloc((size_t)workers * PQ_CENTROIDS * chunk_dim_max(pq) * sizeof *work.centroids);
    if (!work.points || !work.centroids) {
        error_set(err, ERR_NOMEM, "no memory to train %u chunks on %u vectors", chunk_count,
                  training->count);
        goto done;
    }
    pool_for(whole_chunks ? pool : NULL, chunk_count, 1, chunks_range, &work);
    if (atomic_load(&work.failed))
        goto done;
    *out = pq;
    pq = NULL;
    rc = 0;
done:
    free(work.points);
    free(work.centroids);
    pq_free(pq);
    return rc;
}

static uint64_t pq_memory_bytes(const void *code)
{
    const struct pq *pq = code;

    return sizeof *pq + (uint64_t)pq->dim * (sizeof(float) + PQ_CENTROIDS * sizeof(uint16_t)) +
           (uint64_t)pq->chunk_count * sizeof(float);
}

/* Encoding's view of a chunk lies in the scratch: columns, their norms, then what the search of the
 * nearest needs. */
static struct centroid_table widened_chunk(const struct pq *pq, uint32_t chunk, float *columns,
                                           float *half_norms)
{
    uint32_t begin = chunk_begin(pq, chunk);
    struct centroid_table table = {
        .count = PQ_CENTROIDS,
        .dim = chunk_begin(pq, chunk + 1) - begin,
        .stride = PQ_CENTROIDS,
        .mean = pq->mean + begin,
        .columns = columns,
        .half_norms = half_norms,
    };

    return table;
}

static void widen_chunk(const struct pq *pq, uint32_t chunk, struct centroid_table *table)
{
    distance_kernels_best()->f32_from_f16(chunk_columns(pq, chunk), table->columns,
                                          (uint64_t)table->dim * PQ_CENTROIDS);
    memset(table->half_norms, 0, PQ_CENTROIDS * sizeof *table->half_norms);
    for (uint32_t d = 0; d < table->dim; d++) {
        float *row = table->columns + (size_t)d * PQ_CENTROIDS;

        for (uint32_t j = 0; j < PQ_CENTROIDS; j++) {
            row[j] *= pq->scale[chunk];
            table->half_norms[j] += 0.5f * row[j] * row[j];
        }
    }
}

static size_t pq_encode_scratch_floats(const void *code)
{
    const struct pq *pq = code;
    struct centroid_table longest = widened_chunk(pq, 0, NULL, NULL);

    return ((size_t)longest.dim + 1) * PQ_CENTROIDS + centroid_scratch_floats(&longest);
}

static void pq_encode_block(const void *code, const float *vectors, uint32_t count, float *scratch,
                            uint8_t *codes, uint64_t code_stride, float *errors)
{
    const struct pq *pq = code;
    float *half_norms = scratch + (size_t)chunk_dim_max(pq) * PQ_CENTROIDS;
    float *rest = half_norms + PQ_CENTROIDS;

    if (errors)
        memset(errors, 0, count * sizeof *errors);
    for (uint32_t c = 0; c < pq->chunk_count; c++) {
        struct centroid_table table = widened_chunk(pq, c, scratch, half_norms);

        widen_chunk(pq, c, &table);
        for (uint32_t first = 0; first < count; first += CENTROID_BLOCK) {
            uint32_t points = count - first < CENTROID_BLOCK ? count - first : CENTROID_BLOCK;
            uint32_t ids[CENTROID_BLOCK];
            float distances[CENTROID_BLOCK];

            centroid_nearest(&table, vectors + (size_t)first * pq->dim + chunk_begin(pq, c),
                             pq->dim, points, rest, ids, errors ? distances : NULL);
            for (uint32_t i = 0; i < points; i++)
                codes[(first + i) * code_stride + c] = (uint8_t)ids[i];
            for (uint32_t i = 0; errors && i < points; i++)
                errors[first + i] += distances[i];
        }
    }
}

static void pq_decode(const void *code, const uint8_t *bytes, float *vector)
{
    const struct pq *pq = code;
    const struct distance_kernels *kernels = distance_kernels_best();

    for (uint32_t c = 0; c < pq->chunk_count; c++) {
        const uint16_t *column = chunk_columns(pq, c) + bytes[c];

        for (uint32_t d = chunk_begin(pq, c); d < chunk_begin(pq, c + 1); d++) {
            float number;

            kernels->f32_from_f16(column, &number, 1);
            vector[d] = pq->mean[d] + pq->scale[c] * number;
            column += PQ_CENTROIDS;
        }
    }
}

static size_t pq_scratch_floats(const void *code)
{
    return chunk_dim_max(code); /* a chunk of the query */
}

static void pq_table(const void *code, enum metric metric, const float *query, float *scratch,
                     float *shares)
{
    const struct pq *pq = code;
    const struct code_kernels *kernels = code_kernels_best();
    const uint16_t *columns = pq->columns;
    uint32_t begin = 0;

    for (uint32_t c = 0; c < pq->chunk_count; c++) {
        uint32_t chunk_dim = chunk_begin(pq, c + 1) - begin;
        const float *part = query + begin;
        const float *mean = pq->mean + begin;
        float scale = pq->scale[c];

        if (metric == METRIC_L2) {
            float inverse = 1 / scale;

            for (uint32_t d = 0; d < chunk_dim; d++)
                scratch[d] = (part[d] - mean[d]) * inverse;
            kernels->l2_halves(scratch, chunk_dim, columns, PQ_CENTROIDS, PQ_CENTROIDS,
                               scale * scale, shares);
        } else {
            float base = 0;

            for (uint32_t d = 0; d < chunk_dim; d++)
                base -= part[d] * mean[d];
            kernels->dot_halves(part, chunk_dim, columns, PQ_CENTROIDS, PQ_CENTROIDS, base, -scale,
                                shares);
        }
        begin += chunk_dim;
        columns += (size_t)chunk_dim * PQ_CENTROIDS;
        shares += PQ_CENTROIDS;
    }
}

static uint64_t pq_stored_bytes(uint32_t dim, uint32_t chunk_count)
{
    return sizeof(float) * ((uint64_t)dim + chunk_count) +
           sizeof(uint16_t) * (uint64_t)dim * PQ_CENTROIDS;
}

/* The means, the scales, then the columns as they are in memory. */
static void pq_write(const void *code, uint8_t *bytes)
{
    const struct pq *pq = code;

    code_write_floats(bytes, pq->mean, pq->dim);
    bytes += pq->dim * sizeof(float);
    code_write_floats(bytes, pq->scale, pq->chunk_count);
    bytes += pq->chunk_count * sizeof(float);
    code_write_halves(bytes, pq->columns, (size_t)pq->dim * PQ_CENTROIDS);
}

static int pq_read(const uint8_t *bytes, uint32_t dim, uint32_t chunk_count, void **out,
                   struct error *err)
{
    struct pq *pq = pq_new(dim, chunk_count, err);
    const uint8_t *scales = bytes + dim * sizeof(float);
    const uint8_t *columns = scales + chunk_count * sizeof(float);

    if (!pq)
        return -1;
    if (code_read_floats(bytes, dim, "mean", pq->mean, err) < 0 ||
        code_read_floats(scales, chunk_count, "scale", pq->scale, err) < 0 ||
        code_read_halves(columns, (size_t)dim * PQ_CENTROIDS, "centroid", pq->columns, err) < 0)
        goto fail;
    for (uint32_t c = 0; c < chunk_count; c++) {
        /* The inverse of what passes is finite too. */
        if (!(pq->scale[c] >= FLT_MIN) || !isfinite(pq->scale[c] * HALF_MAX)) {
            error_set(err, ERR_CORRUPT, "scale %u of the quantiser is %g", c, (double)pq->scale[c]);
            goto fail;
        }
    }
    *out = pq;
    return 0;
fail:
    pq_free(pq);
    return -1;
}

const struct code_methods pq_methods = {
    .kind = CODE_PQ,
    .name = "pq",
    .refuses = pq_refuses,
    .train_units = pq_train_units,
    .train = pq_train,
    .free = pq_free,
    .memory_bytes = pq_memory_bytes,
    .encode_scratch_floats = pq_encode_scratch_floats,
    .encode_block = pq_encode_block,
    .decode = pq_decode,
    .scratch_floats = pq_scratch_floats,
    .table = pq_table,
    .stored_bytes = pq_stored_bytes,
    .write = pq_write,
    .read = pq_read,
};
