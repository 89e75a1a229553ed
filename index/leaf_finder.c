/* How it works: distances from a chunk of rows to panels of group centroids go into a pool for each
 * row. What the pools end with is turned round: for each group the rows that chose it. Groups are
 * then taken in order, each one block product of picked rows against 64 leaves, offered to the
 * rows' second pools, which take the place of the first. A single probe needs no pool: a leaf
 * counts when it is nearer than all before it, and groups come in ascending order, so ties fall to
 * the smaller number. */
#include "index/leaf_finder.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/block_products.h"
#include "index/list_kernels.h"

#define GROUP_PANEL 256u   /* group centroids compared at once */
#define GROUP_LEAVES 64u   /* of a group at most, more than half of it at least */
#define GROUPS_MAX 48u     /* chosen by a row */
#define POOL_LIMIT_MIN 32u /* smaller pools are slower */

struct leaf_finder {
    struct row_shape shape;
    uint32_t leaf_count;
    uint32_t group_count;
    uint32_t *group_begins; /* group_count + 1 leaf numbers */
    uint8_t *leaves;        /* leaf_count rows, stride apart */
    uint8_t *groups;
    float *leaf_norms;
    float *group_norms;
};

struct leaf_finder_scratch {
    uint32_t rows_max; /* of a chunk */
    uint32_t probes_max;
    uint32_t limit_max;       /* of a row's pool */
    float *norms;             /* rows_max */
    float *distances;         /* rows_max x GROUP_PANEL */
    struct block_pool *pools; /* rows_max */
    float *pool_distances;    /* rows_max x 2 limit_max */
    uint32_t *pool_ids;       /* the same */
    uint32_t *starts;         /* group_count + 1 */
    uint32_t *picks;          /* rows_max x groups chosen */
    float *best;              /* rows_max: for a single probe */
};

/* Leaves stand as page_layout.c's tree left them: each node's left half has half of its leaves,
 * rounded up. Groups are nodes of that tree, the first on each way down that are small enough.
 * Writes where each begins to `begins` unless that is NULL; returns how many there are. */
static uint32_t cut_groups(uint32_t first, uint32_t leaf_count, uint32_t *begins)
{
    uint32_t left = leaf_count - leaf_count / 2, count;

    if (leaf_count <= GROUP_LEAVES) {
        if (begins)
            *begins = first;
        return 1;
    }
    count = cut_groups(first, left, begins);
    return count + cut_groups(first + left, leaf_count - left, begins ? begins + count : NULL);
}

static uint32_t group_count_of(uint32_t leaf_count)
{
    return cut_groups(0, leaf_count, NULL);
}

/* How many groups a row chooses: an eighth for its nearest leaf, half as many again for a list, as
 * long as there are few. Of SIFT's 128 groups 16 hold the nearest leaf of 99.8 % of the rows; 24
 * hold 99.5 % of the 24 nearest leaves. */
static uint32_t groups_chosen(uint32_t group_count, uint32_t probes)
{
    uint32_t least = probes == 1 ? 16 : 24,
             wanted = (uint32_t)((uint64_t)group_count * least / 128);

    wanted = wanted < least ? least : wanted > GROUPS_MAX ? GROUPS_MAX : wanted;
    return wanted < group_count ? wanted : group_count;
}

static uint32_t pool_limit(uint32_t wanted)
{
    return wanted < POOL_LIMIT_MIN ? POOL_LIMIT_MIN : wanted;
}

static void *aligned_zeros(uint64_t bytes)
{
    void *at = NULL;

    if (posix_memalign(&at, 64, bytes ? bytes : 64) != 0)
        return NULL;
    memset(at, 0, bytes);
    return at;
}

/* A centroid in the type of the rows. */
static void put_row(const struct row_shape *shape, const float *values, uint8_t *out)
{
    if (shape->space_type == ELEMENT_F32) {
        memcpy(out, values, shape->space_dim * sizeof *values);
        return;
    }
    for (uint32_t d = 0; d < shape->space_dim; d++) {
        float low = shape->space_type == ELEMENT_U8 ? 0 : -128;
        float value = values[d] < low ? low : values[d] > low + 255 ? low + 255 : values[d];

        out[d] = (uint8_t)lrintf(value);
    }
}

int leaf_finder_new(const struct row_shape *shape, const float *centroids, uint32_t leaf_count,
                    struct leaf_finder **out, struct error *err)
{
    struct leaf_finder *f = calloc(1, sizeof *f);
    uint32_t dim = shape->space_dim;
    float *mean = malloc(dim * sizeof *mean);
    int rc = -1;

    assert(leaf_count > 0);
    if (!f || !mean)
        goto nomem;
    f->shape = *shape;
    f->leaf_count = leaf_count;
    f->group_count = group_count_of(leaf_count);
    f->group_begins = malloc((f->group_count + 1ull) * sizeof *f->group_begins);
    f->leaves = aligned_zeros(leaf_count * shape->stride);
    f->groups = aligned_zeros(f->group_count * shape->stride);
    f->leaf_norms = malloc(leaf_count * sizeof *f->leaf_norms);
    f->group_norms = malloc(f->group_count * sizeof *f->group_norms);
    if (!f->group_begins || !f->leaves || !f->groups || !f->leaf_norms || !f->group_norms)
        goto nomem;
    cut_groups(0, leaf_count, f->group_begins);
    f->group_begins[f->group_count] = leaf_count;
    for (uint32_t g = 0; g < f->group_count; g++) {
        uint32_t begin = f->group_begins[g], end = f->group_begins[g + 1];

        memset(mean, 0, dim * sizeof *mean);
        for (uint32_t leaf = begin; leaf < end; leaf++) {
            const float *centroid = centroids + (uint64_t)leaf * dim;

            put_row(shape, centroid, f->leaves + leaf * shape->stride);
            for (uint32_t d = 0; d < dim; d++)
                mean[d] += centroid[d];
        }
        for (uint32_t d = 0; d < dim; d++)
            mean[d] /= (float)(end - begin);
        put_row(shape, mean, f->groups + g * shape->stride);
    }
    block_norms(shape->space_type, f->leaves, leaf_count, dim, f->leaf_norms);
    block_norms(shape->space_type, f->groups, f->group_count, dim, f->group_norms);
    *out = f;
    f = NULL; /* moved to the caller */
    rc = 0;
    goto done;
nomem:
    error_set(err, ERR_NOMEM, "no memory for %u centroids", leaf_count);
done:
    leaf_finder_free(f);
    free(mean);
    return rc;
}

void leaf_finder_free(struct leaf_finder *finder)
{
    if (!finder)
        return;
    free(finder->group_begins);
    free(finder->leaves);
    free(finder->groups);
    free(finder->leaf_norms);
    free(finder->group_norms);
    free(finder);
}

int leaf_finder_scratch_new(const struct leaf_finder *finder, uint32_t rows_max, uint32_t probes,
                            struct leaf_finder_scratch **out, struct error *err)
{
    struct leaf_finder_scratch *s = calloc(1, sizeof *s);
    uint32_t chosen = groups_chosen(finder->group_count, probes);
    uint64_t rows, places;

    assert(rows_max > 0 && probes > 0 && probes <= LEAF_FINDER_PROBES_MAX);
    if (!s)
        goto nomem;
    s->rows_max = rows_max < LEAF_FINDER_ROWS ? rows_max : LEAF_FINDER_ROWS;
    s->probes_max = probes;
    s->limit_max = pool_limit(chosen > probes ? chosen : probes);
    rows = s->rows_max;
    places = rows * 2 * s->limit_max;
    s->norms = malloc(rows * sizeof *s->norms);
    s->best = malloc(rows * sizeof *s->best);
    s->distances = aligned_zeros(rows * GROUP_PANEL * sizeof *s->distances);
    s->pools = malloc(rows * sizeof *s->pools);
    s->pool_distances = malloc(places * sizeof *s->pool_distances);
    s->pool_ids = malloc(places * sizeof *s->pool_ids);
    s->starts = malloc((finder->group_count + 1ull) * sizeof *s->starts);
    s->picks = malloc(rows * chosen * sizeof *s->picks);
    if (!s->norms || !s->best || !s->distances || !s->pools || !s->pool_distances || !s->pool_ids ||
        !s->starts || !s->picks)
        goto nomem;
    *out = s;
    return 0;
nomem:
    leaf_finder_scratch_free(s);
    return error_set(err, ERR_NOMEM, "no memory to compare rows with %u centroids",
                     finder->leaf_count);
}

void leaf_finder_scratch_free(struct leaf_finder_scratch *scratch)
{
    if (!scratch)
        return;
    free(scratch->norms);
    free(scratch->best);
    free(scratch->distances);
    free(scratch->pools);
    free(scratch->pool_distances);
    free(scratch->pool_ids);
    free(scratch->starts);
    free(scratch->picks);
    free(scratch);
}

uint64_t leaf_finder_memory_bytes(const struct row_shape *shape, uint32_t leaf_count,
                                  uint32_t workers)
{
    uint64_t groups = group_count_of(leaf_count), chosen = groups_chosen((uint32_t)groups, 2);
    uint64_t limit =
        pool_limit((uint32_t)(chosen > LEAF_FINDER_PROBES_MAX ? chosen : LEAF_FINDER_PROBES_MAX));
    uint64_t row = 2 * sizeof(float) + GROUP_PANEL * sizeof(float) + sizeof(struct block_pool) +
                   2 * limit * (sizeof(float) + sizeof(uint32_t)) + chosen * sizeof(uint32_t);

    return (leaf_count + groups) * (shape->stride + sizeof(float)) + shape->space_dim * 4ull +
           (groups + 1) * sizeof(uint32_t) +
           workers * (LEAF_FINDER_ROWS * row + (groups + 1) * sizeof(uint32_t));
}

static void pools_init(struct leaf_finder_scratch *s, uint32_t rows, uint32_t limit)
{
    for (uint32_t i = 0; i < rows; i++) {
        uint64_t at = (uint64_t)i * 2 * s->limit_max;

        block_pool_init(&s->pools[i], s->pool_distances + at, s->pool_ids + at, limit);
    }
}

/* Fills starts and picks: rows picks[starts[g]] to picks[starts[g + 1] - 1] chose group g. */
static void choose_groups(const struct leaf_finder *f, struct leaf_finder_scratch *s,
                          const uint8_t *space_rows, uint32_t rows, uint32_t chosen)
{
    pools_init(s, rows, pool_limit(chosen));
    for (uint32_t first = 0; first < f->group_count; first += GROUP_PANEL) {
        uint32_t count =
            f->group_count - first < GROUP_PANEL ? f->group_count - first : GROUP_PANEL;

        block_distances(f->shape.space_type, space_rows, NULL, rows, s->norms,
                        f->groups + first * f->shape.stride, count, f->group_norms + first,
                        f->shape.space_dim, s->distances, GROUP_PANEL);
        for (uint32_t i = 0; i < rows; i++)
            block_pool_offer(&s->pools[i], s->distances + (uint64_t)i * GROUP_PANEL, count, first,
                             UINT32_MAX);
    }
    memset(s->starts, 0, (f->group_count + 1ull) * sizeof *s->starts);
    for (uint32_t i = 0; i < rows; i++) {
        uint32_t found = block_pool_finish(&s->pools[i]);

        s->pools[i].count = found < chosen ? found : chosen;
        for (uint32_t j = 0; j < s->pools[i].count; j++)
            s->starts[s->pools[i].ids[j]]++;
    }
    for (uint32_t g = 0, sum = 0; g <= f->group_count; g++) {
        uint32_t count = s->starts[g];

        s->starts[g] = sum;
        sum += count;
    }
    for (uint32_t i = 0; i < rows; i++)
        for (uint32_t j = 0; j < s->pools[i].count; j++)
            s->picks[s->starts[s->pools[i].ids[j]]++] = i;
    /* Each start has moved to the next group's. */
    memmove(s->starts + 1, s->starts, f->group_count * sizeof *s->starts);
    s->starts[0] = 0;
}

static void take_nearest(float *best, uint32_t *leaf, const float *distances, uint32_t count,
                         uint32_t first, const struct list_kernels *lists)
{
    if (lists->below(distances, count, *best) == 0)
        return;
    for (uint32_t j = 0; j < count; j++) {
        if (distances[j] < *best) {
            *best = distances[j];
            *leaf = first + j;
        }
    }
}

static void find_chunk(const struct leaf_finder *f, struct leaf_finder_scratch *s,
                       const uint8_t *space_rows, uint32_t rows, uint32_t probes, uint32_t *leaves)
{
    const struct list_kernels *lists = list_kernels_best();
    uint32_t chosen = groups_chosen(f->group_count, probes);
    bool all = chosen == f->group_count;

    block_norms(f->shape.space_type, space_rows, rows, f->shape.space_dim, s->norms);
    if (!all)
        choose_groups(f, s, space_rows, rows, chosen);
    pools_init(s, rows, pool_limit(probes));
    for (uint32_t i = 0; i < rows; i++) {
        s->best[i] = INFINITY;
        leaves[(uint64_t)i * probes] = 0; /* of distances that are no numbers, the first leaf's */
    }
    for (uint32_t g = 0; g < f->group_count; g++) {
        uint32_t first = f->group_begins[g], count = f->group_begins[g + 1] - first;
        const uint32_t *pick = all ? NULL : s->picks + s->starts[g];
        uint32_t picked = all ? rows : s->starts[g + 1] - s->starts[g];

        block_distances(f->shape.space_type, space_rows, pick, picked, s->norms,
                        f->leaves + first * f->shape.stride, count, f->leaf_norms + first,
                        f->shape.space_dim, s->distances, GROUP_LEAVES);
        for (uint32_t i = 0; i < picked; i++) {
            const float *distances = s->distances + (uint64_t)i * GROUP_LEAVES;
            uint32_t row = pick ? pick[i] : i;

            if (probes == 1)
                take_nearest(&s->best[row], &leaves[row], distances, count, first, lists);
            else
                block_pool_offer(&s->pools[row], distances, count, first, UINT32_MAX);
        }
    }
    for (uint32_t i = 0; i < rows && probes > 1; i++) {
        uint32_t found = block_pool_finish(&s->pools[i]);

        for (uint32_t j = 0; j < probes; j++)
            leaves[(uint64_t)i * probes + j] = j < found ? s->pools[i].ids[j] : LEAF_NONE;
    }
}

void leaf_finder_find(const struct leaf_finder *finder, struct leaf_finder_scratch *scratch,
                      const uint8_t *space_rows, uint32_t rows, uint32_t probes, uint32_t *leaves)
{
    assert(probes > 0 && probes <= scratch->probes_max);
    for (uint32_t first = 0; first < rows; first += scratch->rows_max) {
        uint32_t count = rows - first < scratch->rows_max ? rows - first : scratch->rows_max;

        find_chunk(finder, scratch, space_rows + first * finder->shape.stride, count, probes,
                   leaves + (uint64_t)first * probes);
    }
}
