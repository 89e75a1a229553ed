/* A Lloyd step is two loops over the pool. The first assigns points in fixed blocks: each point's
 * answer stands alone. The second recomputes centroids, one cluster at a time: a counting sort
 * lists each cluster's points in row order, so that a cluster's sum has one order of additions
 * whoever does it. That needs four bytes a point, where partial sums per block would need a set of
 * centroids each, gigabytes for the partitions of a large file.
 *
 * Nearest is the least |c|^2 / 2 - x.c, with x and c taken relative to the centroids' mean: far
 * from the origin the two terms would cancel to noise. Few dimensions go through our own loop, many
 * through GEMM, which wins from about 12 on; both cut centroids in the same order. */
#include "index/kmeans.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "index/code_kernels.h"
#include "index/gemm.h"
#include "storage/base/random.h"

#define KERNEL_DIM_MAX 12u   /* above, GEMM is faster (measured for 256 centroids) */
#define PRODUCT_COLUMNS 256u /* centroids a GEMM call takes: products of a block stay in cache */
#define CLUSTER_GRAIN 16u
#define SEED_SAMPLE_FACTOR 32u     /* sampled points a cluster when seeding */
#define SEED_BLOCK 256u            /* sampled points of which the sum is kept */
#define SEED_WORK_MAX (1ull << 33) /* multiplications k-means++ may take, about a second */

static uint32_t round_to_lanes(uint32_t count)
{
    return (count + CODE_LANES - 1) / CODE_LANES * CODE_LANES;
}

void centroid_table_release(struct centroid_table *table)
{
    free(table->mean);
    free(table->columns);
    free(table->half_norms);
    memset(table, 0, sizeof *table);
}

void centroid_table_norms(struct centroid_table *table)
{
    for (uint32_t j = 0; j < table->stride; j++) {
        double sum = 0;

        for (uint32_t d = 0; d < table->dim; d++) {
            double x = table->columns[(uint64_t)d * table->stride + j];

            sum += x * x;
        }
        table->half_norms[j] = j < table->count ? (float)(0.5 * sum) : INFINITY;
    }
}

/* Fills a table whose arrays exist. */
static void table_fill(struct centroid_table *table, const float *centroids)
{
    uint32_t dim = table->dim;

    for (uint32_t d = 0; d < dim; d++) {
        float *column = table->columns + (uint64_t)d * table->stride;
        double sum = 0;

        for (uint32_t j = 0; j < table->count; j++)
            sum += centroids[(uint64_t)j * dim + d];
        table->mean[d] = (float)(sum / table->count);
        for (uint32_t j = 0; j < table->count; j++)
            column[j] = centroids[(uint64_t)j * dim + d] - table->mean[d];
        memset(column + table->count, 0, (table->stride - table->count) * sizeof *column);
    }
    centroid_table_norms(table);
}

static int table_alloc(struct centroid_table *table, uint32_t count, uint32_t dim,
                       struct error *err)
{
    memset(table, 0, sizeof *table);
    table->count = count;
    table->dim = dim;
    table->stride = round_to_lanes(count);
    table->mean = calloc(dim, sizeof *table->mean);
    table->columns = calloc((size_t)dim * table->stride, sizeof *table->columns);
    table->half_norms = calloc(table->stride, sizeof *table->half_norms);
    if (!table->mean || !table->columns || !table->half_norms) {
        centroid_table_release(table);
        return error_set(err, ERR_NOMEM, "no memory for %u centroids of %u dimensions", count, dim);
    }
    return 0;
}

int centroid_table_init(struct centroid_table *table, const float *centroids, uint32_t count,
                        uint32_t dim, struct error *err)
{
    if (table_alloc(table, count, dim, err) < 0)
        return -1;
    table_fill(table, centroids);
    return 0;
}

size_t centroid_scratch_floats(const struct centroid_table *table)
{
    size_t products = table->dim > KERNEL_DIM_MAX ? PRODUCT_COLUMNS : 0;

    /* centred points, their norms and scores, products */
    return CENTROID_BLOCK * (table->dim + 2 + products);
}

void centroid_nearest(const struct centroid_table *table, const float *points, uint64_t stride,
                      uint32_t point_count, float *scratch, uint32_t *ids, float *distances)
{
    const struct code_kernels *kernels = code_kernels_best();
    uint32_t dim = table->dim;
    float *centred = scratch;
    float *norms = centred + (size_t)CENTROID_BLOCK * dim;
    float *scores = norms + CENTROID_BLOCK;
    float *products = scores + CENTROID_BLOCK;

    for (uint32_t i = 0; i < point_count; i++) {
        const float *point = points + i * stride;
        float *row = centred + (size_t)i * dim;
        float norm = 0;

        for (uint32_t d = 0; d < dim; d++) {
            row[d] = point[d] - table->mean[d];
            norm += row[d] * row[d];
        }
        norms[i] = norm;
    }
    if (dim <= KERNEL_DIM_MAX) {
        kernels->nearest(centred, point_count, dim, table->columns, table->stride,
                         table->half_norms, table->stride, ids, scores);
    } else {
        for (uint32_t i = 0; i < point_count; i++) {
            ids[i] = 0;
            scores[i] = INFINITY;
        }
        for (uint32_t j = 0; j < table->stride; j += PRODUCT_COLUMNS) {
            uint32_t left = table->stride - j;
            uint32_t width = left < PRODUCT_COLUMNS ? left : PRODUCT_COLUMNS;

            gemm_f32(false, false, point_count, width, dim, 1.0f, centred, dim, table->columns + j,
                     table->stride, 0.0f, products, width);
            kernels->nearest_of_products(products, point_count, table->half_norms + j, width, j,
                                         ids, scores);
        }
    }
    for (uint32_t i = 0; distances && i < point_count; i++) {
        float distance = norms[i] + 2 * scores[i];

        distances[i] = distance > 0 ? distance : 0; /* rounding may take it below */
    }
}

/* What the loops of one training share. */
struct lloyd {
    const struct kmeans_params *params;
    struct centroid_table table;
    size_t scratch_floats;
    float *scratch;   /* workers x scratch_floats */
    double *sums;     /* workers x dim */
    uint32_t *ids;    /* count: each point's cluster */
    float *distances; /* count: to its centroid */
    uint32_t *order;  /* count: points by cluster, then by row */
    uint64_t *starts; /* cluster_count + 1: where a cluster begins in order */
    float *centroids; /* cluster_count x dim, the caller's */
};

static void assign_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct lloyd *lloyd = context;
    const struct kmeans_params *params = lloyd->params;

    centroid_nearest(&lloyd->table, params->points + begin * params->stride, params->stride,
                     (uint32_t)(end - begin), lloyd->scratch + worker * lloyd->scratch_floats,
                     lloyd->ids + begin, lloyd->distances + begin);
}

static void sort_by_cluster(struct lloyd *lloyd)
{
    uint64_t count = lloyd->params->count;
    uint32_t clusters = lloyd->params->cluster_count;
    uint64_t *starts = lloyd->starts;

    memset(starts, 0, (clusters + 1ull) * sizeof *starts);
    for (uint64_t i = 0; i < count; i++)
        starts[lloyd->ids[i] + 1]++;
    for (uint32_t c = 0; c < clusters; c++)
        starts[c + 1] += starts[c];
    for (uint64_t i = 0; i < count; i++)
        lloyd->order[starts[lloyd->ids[i]]++] = (uint32_t)i;
    /* Filling moved every start to its cluster's end, which is the next one's start. */
    memmove(starts + 1, starts, clusters * sizeof *starts);
    starts[0] = 0;
}

static void mean_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct lloyd *lloyd = context;
    const struct kmeans_params *params = lloyd->params;
    uint32_t dim = params->dim;
    double *sum = lloyd->sums + (size_t)worker * dim;

    for (uint64_t c = begin; c < end; c++) {
        uint64_t size = lloyd->starts[c + 1] - lloyd->starts[c];

        if (size == 0)
            continue; /* keeps its centroid unless it is reseeded */
        memset(sum, 0, dim * sizeof *sum);
        for (uint64_t i = lloyd->starts[c]; i < lloyd->starts[c + 1]; i++) {
            const float *point = params->points + lloyd->order[i] * params->stride;

            for (uint32_t d = 0; d < dim; d++)
                sum[d] += point[d];
        }
        for (uint32_t d = 0; d < dim; d++)
            lloyd->centroids[c * dim + d] = (float)(sum[d] / (double)size);
    }
}

/* Puts each empty cluster on the point that is worst served, one point a cluster. Stops when no
 * point is away from its centroid: then there are fewer distinct points than clusters. */
static void reseed_empty(struct lloyd *lloyd)
{
    const struct kmeans_params *params = lloyd->params;

    for (uint32_t c = 0; c < params->cluster_count; c++) {
        uint64_t farthest = 0;

        if (lloyd->starts[c + 1] > lloyd->starts[c])
            continue;
        for (uint64_t i = 1; i < params->count; i++) {
            if (lloyd->distances[i] > lloyd->distances[farthest])
                farthest = i;
        }
        if (!(lloyd->distances[farthest] > 0))
            break;
        memcpy(lloyd->centroids + (uint64_t)c * params->dim,
               params->points + farthest * params->stride, params->dim * sizeof(float));
        lloyd->distances[farthest] = 0;
    }
}

static uint32_t seed_blocks(uint32_t stride)
{
    return (stride + SEED_BLOCK - 1) / SEED_BLOCK;
}

/* Takes distances into nearest, stride of each, and returns the sum of what is left; sums gets that
 * of each block. Lane by lane: one running sum would wait for every addition. */
static double nearer_of(float *nearest, const float *distances, uint32_t stride, double *sums)
{
    double total = 0;

    for (uint32_t b = 0; b < seed_blocks(stride); b++) {
        uint32_t end = (b + 1) * SEED_BLOCK < stride ? (b + 1) * SEED_BLOCK : stride;
        float lanes[CODE_LANES] = {0};

        for (uint32_t i = b * SEED_BLOCK; i < end; i += CODE_LANES) {
            for (uint32_t l = 0; l < CODE_LANES; l++) {
                float x = distances[i + l] < nearest[i + l] ? distances[i + l] : nearest[i + l];

                nearest[i + l] = x;
                lanes[l] += x;
            }
        }
        sums[b] = 0;
        for (uint32_t l = 0; l < CODE_LANES; l++)
            sums[b] += lanes[l];
        total += sums[b];
    }
    return total;
}

/* The point at which the running sum of `nearest` passes target, found by blocks first. The last
 * point with any distance stands in should rounding carry past the end; `otherwise` when all are
 * zero. */
static uint32_t point_at(const float *nearest, uint32_t stride, const double *sums, double target,
                         uint32_t otherwise)
{
    uint32_t block = 0, pick = otherwise;
    double rest = 0;

    for (uint32_t b = 0; b < seed_blocks(stride); b++) {
        if (!(sums[b] > 0))
            continue;
        block = b;
        rest = target;
        target -= sums[b];
        if (target < 0)
            break;
    }
    for (uint32_t i = block * SEED_BLOCK; i < stride && i < (block + 1) * SEED_BLOCK; i++) {
        if (nearest[i] > 0) {
            pick = i;
            rest -= nearest[i];
            if (rest < 0)
                break;
        }
    }
    return pick;
}

/* Seeds from the sample's columns (dim x stride, `sampled` of them): each next one is drawn with
 * probability proportional to the squared distance from the nearest so far. */
static void seed_plus_plus(const struct kmeans_params *params, struct random *random,
                           const float *columns, uint32_t stride, uint32_t sampled, float *nearest,
                           float *distances, double *sums, float *centroids)
{
    const struct code_kernels *kernels = code_kernels_best();
    uint32_t dim = params->dim;
    uint32_t pick = (uint32_t)random_below(random, sampled);

    for (uint32_t i = 0; i < stride; i++)
        nearest[i] = i < sampled ? INFINITY : 0; /* never picks what is padding */
    for (uint32_t c = 0; c < params->cluster_count; c++) {
        float *centroid = centroids + (uint64_t)c * dim;
        double total;

        for (uint32_t d = 0; d < dim; d++)
            centroid[d] = columns[(uint64_t)d * stride + pick];
        kernels->l2_columns(centroid, dim, columns, stride, stride, distances);
        total = nearer_of(nearest, distances, stride, sums);
        pick = point_at(nearest, stride, sums, total * random_float(random), pick);
    }
}

static int seed_centroids(const struct kmeans_params *params, float *centroids, struct error *err)
{
    uint32_t clusters = params->cluster_count;
    uint32_t dim = params->dim;
    uint64_t sampled = (uint64_t)clusters * SEED_SAMPLE_FACTOR;
    bool plain;
    struct random random;
    float *columns = NULL, *nearest = NULL;
    double *sums = NULL;
    uint32_t stride;
    int rc = -1;

    random_init(&random, params->seed, params->stream);
    if (sampled > params->count)
        sampled = params->count;
    plain = (double)sampled * clusters * dim > (double)SEED_WORK_MAX;
    if (plain)
        sampled = clusters;
    stride = round_to_lanes((uint32_t)sampled);
    columns = calloc((size_t)dim * stride, sizeof *columns);
    nearest = calloc(2ull * stride, sizeof *nearest);
    sums = calloc(seed_blocks(stride), sizeof *sums);
    if (!columns || !nearest || !sums) {
        error_set(err, ERR_NOMEM, "no memory to seed %u clusters from %llu points", clusters,
                  (unsigned long long)sampled);
        goto done;
    }
    /* One point at random from each of `sampled` equal parts: distinct, and spread over a file that
     * is sorted. */
    for (uint64_t i = 0; i < sampled; i++) {
        uint64_t begin = i * params->count / sampled;
        uint64_t end = (i + 1) * params->count / sampled;
        const float *point =
            params->points + (begin + random_below(&random, end - begin)) * params->stride;

        if (plain) {
            memcpy(centroids + i * dim, point, dim * sizeof *point);
        } else {
            for (uint32_t d = 0; d < dim; d++)
                columns[(uint64_t)d * stride + i] = point[d];
        }
    }
    if (!plain)
        seed_plus_plus(params, &random, columns, stride, (uint32_t)sampled, nearest,
                       nearest + stride, sums, centroids);
    rc = 0;
done:
    free(columns);
    free(nearest);
    free(sums);
    return rc;
}

static void lloyd_release(struct lloyd *lloyd)
{
    centroid_table_release(&lloyd->table);
    free(lloyd->scratch);
    free(lloyd->sums);
    free(lloyd->ids);
    free(lloyd->distances);
    free(lloyd->order);
    free(lloyd->starts);
}

static int lloyd_init(struct lloyd *lloyd, const struct kmeans_params *params, uint32_t workers,
                      float *centroids, struct error *err)
{
    memset(lloyd, 0, sizeof *lloyd);
    lloyd->params = params;
    lloyd->centroids = centroids;
    if (table_alloc(&lloyd->table, params->cluster_count, params->dim, err) < 0)
        return -1;
    lloyd->scratch_floats = centroid_scratch_floats(&lloyd->table);
    lloyd->scratch = malloc(workers * lloyd->scratch_floats * sizeof *lloyd->scratch);
    lloyd->sums = malloc((size_t)workers * params->dim * sizeof *lloyd->sums);
    lloyd->ids = malloc(params->count * sizeof *lloyd->ids);
    lloyd->distances = malloc(params->count * sizeof *lloyd->distances);
    lloyd->order = malloc(params->count * sizeof *lloyd->order);
    lloyd->starts = malloc((params->cluster_count + 1ull) * sizeof *lloyd->starts);
    if (!lloyd->scratch || !lloyd->sums || !lloyd->ids || !lloyd->distances || !lloyd->order ||
        !lloyd->starts)
        return error_set(err, ERR_NOMEM, "no memory for k-means of %llu points",
                         (unsigned long long)params->count);
    return 0;
}

int kmeans_train(const struct kmeans_params *params, struct pool *pool, struct job *job,
                 float *centroids, struct error *err)
{
    struct lloyd lloyd = {0};
    int rc = -1;

    if (params->dim == 0 || params->stride < params->dim || params->cluster_count == 0 ||
        params->count < params->cluster_count || params->count > UINT32_MAX)
        return error_set(err, ERR_INVALID,
                         "k-means of %llu points of %u dimensions into %u clusters: wants a "
                         "dimension and at least as many points as clusters",
                         (unsigned long long)params->count, params->dim, params->cluster_count);
    if (lloyd_init(&lloyd, params, pool_workers(pool), centroids, err) < 0 ||
        seed_centroids(params, centroids, err) < 0)
        goto done;
    for (uint32_t i = 0; i < params->iterations; i++) {
        table_fill(&lloyd.table, centroids);
        pool_for(pool, params->count, CENTROID_BLOCK, assign_range, &lloyd);
        sort_by_cluster(&lloyd);
        pool_for(pool, params->cluster_count, CLUSTER_GRAIN, mean_range, &lloyd);
        reseed_empty(&lloyd);
        if (job_advance(job, 1, err) < 0)
            goto done;
    }
    rc = 0;
done:
    lloyd_release(&lloyd);
    return rc;
}
