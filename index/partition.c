/* How it works, files in the journal's scratch folder:
 *
 *   centroids   floats, until "leaves" holds them
 *   assigned    u32 leaf of each input row, a CRC-32C after each round; removed at the end
 *   bucket-N    (u32 place, raw row, CRC-32C) records in the order of the input
 *
 * Stages, as the journal's state knows them: centroids made; rows assigned, "leaves" and "numbers"
 * written; rows placed. A place is the leaf's beginning and a count of the leaf's rows before, so
 * leaf numbers are all that has to be kept, and places are counted again from them, into the same
 * array, by whoever goes on. With places known for every row, a row can be put anywhere in any
 * order: the work is parallel without a care for order.
 *
 * Rows are assigned in fixed blocks by row number, since products of floats depend on the block's
 * shape. What the memory grants decides how places are cut into buckets, and into passes of as many
 * buckets as there are write buffers for; never what is written. The number of records that an
 * interrupted pass left in a bucket for good follows from the places of the rows before.
 *
 * What is read back is checked, since a disk may lose a write, tear it or put it elsewhere. The
 * checksum of a row starts from its place and goes with it from the moment it is read into "rows";
 * in a bucket the number of the record is added, so that all records of a bucket are there, each
 * once. That of a round of leaf numbers starts from the round's number. */
#include "index/partition.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "index/page_layout.h"
#include "storage/base/bytes.h"
#include "storage/base/random.h"
#include "storage/file.h"

#define SAMPLE_STREAM 0x7061u
#define BLOCK_ROWS_MIN 16u
#define BLOCK_BYTES (4u << 20) /* of a block of rows, about */
#define READ_BYTES (1u << 20)
#define BUCKET_BUFFER (256u << 10)
#define SPARE_MIN (2 * BUCKET_BUFFER)
#define WRITE_BYTES (8u << 20)
#define HUGE_BYTES (2u << 20)

/* Tests make these small, to see all of the ways there are with few rows. */
#ifndef ROUND_BLOCKS
#define ROUND_BLOCKS 256u /* assigned between looks at the clock */
#define BUCKETS_MAX 256u  /* open at once */
#define SPARE_MAX UINT64_MAX
#endif

enum stage { STAGE_NONE, STAGE_CENTROIDS, STAGE_ASSIGNED, STAGE_DONE };

struct failure {
    uint64_t at; /* where the range began that failed */
    struct error err;
};

struct partition {
    struct vfs *vfs;
    const struct vector_source *source;
    const struct row_shape *shape;
    uint64_t seed;
    uint64_t spare; /* bytes of memory for buckets */
    struct journal *journal;
    struct pool *pool;
    struct job *job;
    uint32_t workers;
    uint32_t count;
    uint32_t leaf_count;
    uint32_t block_rows;
    uint64_t block_bytes;     /* of a worker's part of `blocks` */
    uint8_t *blocks;          /* workers x block_bytes */
    struct failure *failures; /* of the workers */
    float *centroids;
    struct leaf_finder *finder;
    struct leaf_finder_scratch **scratch; /* of the workers */
    uint32_t *leaf_begins;
    uint32_t *places; /* by row; until all are assigned, leaf numbers */
};

/* ---- sizes ---- */

static uint32_t leaf_count_of(uint64_t count)
{
    return (uint32_t)((count + PARTITION_LEAF_ROWS - 1) / PARTITION_LEAF_ROWS);
}

static uint32_t sample_count_of(uint64_t count)
{
    uint64_t wanted = (uint64_t)leaf_count_of(count) * PARTITION_SAMPLE;

    return (uint32_t)(wanted < count ? wanted : count);
}

static uint32_t block_rows_of(const struct row_shape *shape)
{
    uint64_t rows = BLOCK_BYTES / shape->stride;

    return rows > LEAF_FINDER_ROWS ? LEAF_FINDER_ROWS
           : rows < BLOCK_ROWS_MIN ? BLOCK_ROWS_MIN
                                   : (uint32_t)rows;
}

/* Rows assigned between looks at the clock; the last round may have fewer. */
static uint64_t round_rows_of(const struct row_shape *shape)
{
    return (uint64_t)ROUND_BLOCKS * block_rows_of(shape);
}

static uint64_t rounds_of(const struct row_shape *shape, uint64_t count)
{
    return (count + round_rows_of(shape) - 1) / round_rows_of(shape);
}

/* Room for a block of space rows, and for a record of a bucket in any case. */
static uint64_t block_bytes_of(const struct row_shape *shape)
{
    return align_up(block_rows_of(shape) * shape->stride + 2 * sizeof(uint32_t), 64);
}

static uint64_t record_bytes_of(const struct row_shape *shape)
{
    return sizeof(uint32_t) + row_store_record_bytes(shape);
}

/* While rows are placed, without the buckets. */
static uint64_t place_memory(const struct row_shape *shape, uint64_t count, uint32_t workers)
{
    return count * sizeof(uint32_t) + 2 * (leaf_count_of(count) + 1ull) * sizeof(uint32_t) +
           workers * (block_bytes_of(shape) + sizeof(struct failure)) +
           BUCKETS_MAX * 2 * sizeof(void *);
}

static uint64_t max_u64(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

uint64_t partition_memory_min(const struct row_shape *shape, uint64_t count, uint32_t workers)
{
    uint64_t leaves = leaf_count_of(count), sample = sample_count_of(count);
    uint64_t centroids = leaves * shape->space_dim * sizeof(float);
    uint64_t finder = leaf_finder_memory_bytes(shape, (uint32_t)leaves, workers);
    uint64_t blocks = workers * (block_bytes_of(shape) + sizeof(struct failure));
    /* Of a sampled row: itself, its number, place in order, leaf, place among the leaf's, and what
     * page_layout.c takes (a key and a group; two centres for each level of the tree). */
    uint64_t layout =
        sample * (8 + 1) + workers * (2 * 33 + 2) * shape->space_dim * 4ull + (2u << 20);
    uint64_t sampling = sample * (shape->stride + 16) + layout + 2 * centroids + finder + blocks;
    uint64_t assigning = place_memory(shape, count, workers) + 2 * centroids + finder;
    uint64_t placing = place_memory(shape, count, workers) + centroids + SPARE_MIN;

    return max_u64(sampling, max_u64(assigning, placing));
}

uint64_t partition_memory_full(const struct row_shape *shape, uint64_t count, uint32_t workers)
{
    uint64_t centroids = (uint64_t)leaf_count_of(count) * shape->space_dim * sizeof(float);

    return max_u64(partition_memory_min(shape, count, workers),
                   place_memory(shape, count, workers) + centroids + SPARE_MIN + HUGE_BYTES +
                       count * row_store_record_bytes(shape));
}

uint64_t partition_scratch_bytes(const struct row_shape *shape, uint64_t count, uint64_t memory)
{
    uint64_t leaves = leaf_count_of(count);
    uint64_t kept = count * (row_store_record_bytes(shape) + sizeof(uint32_t)) +
                    leaves * (shape->space_dim * sizeof(float) + sizeof(uint32_t)) +
                    FILE_BLOCK_BYTES;
    uint64_t passing = count * sizeof(uint32_t) + rounds_of(shape, count) * sizeof(uint32_t) +
                       leaves * shape->space_dim * sizeof(float);

    /* Workers' buffers are not known here: as if there were many. */
    if (memory < partition_memory_full(shape, count, 64))
        passing += count * record_bytes_of(shape);
    return kept + passing;
}

/* ---- failures of ranges ---- */

/* A worker takes ranges in ascending order, so the least of the workers' first failures is the
 * first of all, whoever met it. */
static int first_failure(const struct failure *failures, uint32_t workers, struct error *err)
{
    const struct failure *first = NULL;

    for (uint32_t i = 0; i < workers; i++)
        if (failures[i].err.code != ERR_NONE && (!first || failures[i].at < first->at))
            first = &failures[i];
    return first ? error_set(err, first->err.code, "%s", first->err.message) : 0;
}

/* ---- inspect ---- */

struct inspection {
    const struct vector_source *source;
    const struct row_shape *shape;
    struct job *job;
    uint64_t read_rows;
    uint8_t *rows; /* workers x read_rows */
    struct failure *failures;
    uint8_t (*digests)[DIGEST_BYTES]; /* of the pieces */
    uint64_t *zeros;                  /* of the workers */
    float *norms;
};

static bool is_zero(const uint8_t *row, const struct row_shape *shape)
{
    if (shape->element != ELEMENT_F32) {
        uint8_t bits = 0;

        for (uint64_t i = 0; i < shape->raw_bytes; i++)
            bits |= row[i];
        return bits == 0;
    }
    for (uint32_t d = 0; d < shape->dim; d++)
        if (load_f32(row + 4ull * d) != 0)
            return false;
    return true;
}

static float norm_of(const uint8_t *row, const struct row_shape *shape)
{
    double sum = 0;

    for (uint32_t d = 0; d < shape->dim; d++) {
        double value = shape->element == ELEMENT_F32  ? load_f32(row + 4ull * d)
                       : shape->element == ELEMENT_U8 ? row[d]
                                                      : (int8_t)row[d];

        sum += value * value;
    }
    return (float)sqrt(sum);
}

static void inspect_piece(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct inspection *in = context;
    struct failure *failure = &in->failures[worker];
    uint8_t *rows = in->rows + worker * in->read_rows * in->shape->raw_bytes;
    struct digest *digest;

    if (failure->err.code != ERR_NONE)
        return;
    failure->at = begin;
    digest = digest_new();
    if (!digest) {
        error_set(&failure->err, ERR_NOMEM, "no memory for a digest");
        return;
    }
    for (uint64_t first = begin; first < end; first += in->read_rows) {
        uint64_t count = end - first < in->read_rows ? end - first : in->read_rows;

        if (vector_source_read(in->source, first, count, rows, &failure->err) < 0 ||
            vector_source_check(in->source, rows, first, count, &failure->err) < 0 ||
            job_advance(in->job, count, &failure->err) < 0)
            break;
        digest_update(digest, rows, count * in->shape->raw_bytes);
        for (uint64_t i = 0; i < count; i++) {
            const uint8_t *row = rows + i * in->shape->raw_bytes;

            in->zeros[worker] += is_zero(row, in->shape);
            if (in->shape->metric == METRIC_IP)
                in->norms[worker] = fmaxf(in->norms[worker], norm_of(row, in->shape));
        }
    }
    digest_finish(digest, in->digests[begin / PARTITION_DIGEST_ROWS]);
}

int partition_inspect(const struct vector_source *source, const struct row_shape *shape,
                      struct pool *pool, struct job *job, struct partition_facts *facts,
                      struct error *err)
{
    uint64_t count = vector_source_rows(source);
    uint64_t pieces = (count + PARTITION_DIGEST_ROWS - 1) / PARTITION_DIGEST_ROWS;
    uint32_t workers = pool_workers(pool);
    struct inspection in = {.source = source, .shape = shape, .job = job};
    struct digest *digest = NULL;
    int rc = -1;

    job_phase(job, "inspect", count);
    *facts = (struct partition_facts){.zero_vectors = 0};
    in.read_rows = READ_BYTES / shape->raw_bytes ? READ_BYTES / shape->raw_bytes : 1;
    in.rows = malloc(workers * in.read_rows * shape->raw_bytes);
    in.failures = calloc(workers, sizeof *in.failures);
    in.digests = malloc(pieces * DIGEST_BYTES);
    in.zeros = calloc(workers, sizeof *in.zeros);
    in.norms = calloc(workers, sizeof *in.norms);
    digest = digest_new();
    if (!in.rows || !in.failures || !in.digests || !in.zeros || !in.norms || !digest) {
        error_set(err, ERR_NOMEM, "no memory to read rows of %u dimensions", shape->dim);
        goto done;
    }
    pool_for(pool, count, PARTITION_DIGEST_ROWS, inspect_piece, &in);
    if (first_failure(in.failures, workers, err) < 0)
        goto done;
    for (uint32_t i = 0; i < workers; i++) {
        facts->zero_vectors += in.zeros[i];
        facts->norm_max = fmaxf(facts->norm_max, in.norms[i]);
    }
    digest_update(digest, in.digests, pieces * DIGEST_BYTES);
    rc = 0;
done:
    if (digest)
        digest_finish(digest, facts->digest);
    free(in.rows);
    free(in.failures);
    free(in.digests);
    free(in.zeros);
    free(in.norms);
    return rc;
}

/* ---- scratch files and state ---- */

static int scratch_path(const struct partition *p, const char *name, char *out, struct error *err)
{
    return journal_scratch_path(p->journal, name, out, err);
}

/* A scratch file to write; an old one of the name goes first unless it is to be kept. */
static struct vfs_file *scratch_file(struct partition *p, const char *name, bool keep, char *path,
                                     struct error *err)
{
    if (scratch_path(p, name, path, err) < 0 || (!keep && file_remove_all(p->vfs, path, err) < 0))
        return NULL;
    return keep ? row_store_open_scratch(p->vfs, path, VFS_WRITE, err)
                : file_open(p->vfs, path, VFS_WRITE | VFS_CREATE, err);
}

static int scratch_remove(struct partition *p, const char *name, struct error *err)
{
    char path[FILE_PATH_MAX];

    if (scratch_path(p, name, path, err) < 0)
        return -1;
    return file_remove_all(p->vfs, path, err);
}

static void bucket_name(uint32_t bucket, char out[24])
{
    snprintf(out, 24, "bucket-%u", bucket);
}

/* A number of the state, 0 where there is none. */
static int state_get(struct partition *p, const char *name, uint64_t max, uint64_t *out,
                     struct error *err)
{
    *out = 0;
    if (!manifest_has(journal_state(p->journal), name))
        return 0;
    return manifest_get_u64_in(journal_state(p->journal), name, 0, max, out, err);
}

static int state_set(struct partition *p, const char *name, uint64_t value, struct error *err)
{
    return manifest_set_u64(journal_state(p->journal), name, value, err);
}

/* ---- pass two: centroids ---- */

struct sampling {
    struct partition *p;
    uint32_t count;
    uint32_t *rows;  /* of the input, ascending */
    uint8_t *space;  /* count rows, stride apart */
    uint32_t *order; /* order[position] = number in the sample */
    uint32_t *leaves;
    uint32_t *begins; /* leaf_count + 1 positions */
};

static void sample_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct sampling *s = context;
    struct partition *p = s->p;
    struct failure *failure = &p->failures[worker];
    uint8_t *rows = p->blocks + worker * p->block_bytes;
    uint64_t first = 0, count = 0, window = p->block_rows;

    if (failure->err.code != ERR_NONE)
        return;
    failure->at = begin;
    if (p->shape->raw_bytes >= FILE_BLOCK_BYTES)
        window = 1; /* rows between are worth a leap */
    for (uint64_t i = begin; i < end; i++) {
        if (s->rows[i] >= first + count) {
            first = s->rows[i];
            count = s->rows[end - 1] - first + 1;
            count = count < window ? count : window;
            if (vector_source_read(p->source, first, count, rows, &failure->err) < 0)
                return;
        }
        row_shape_convert(p->shape, rows + (s->rows[i] - first) * p->shape->raw_bytes, 1,
                          s->space + i * p->shape->stride);
    }
    job_advance(p->job, end - begin, &failure->err);
}

/* One row of each of equal stretches. */
static int sample_rows(struct sampling *s, struct error *err)
{
    struct partition *p = s->p;
    struct random random;

    random_init(&random, p->seed, SAMPLE_STREAM);
    for (uint32_t i = 0; i < s->count; i++) {
        uint64_t begin = (uint64_t)i * p->count / s->count;
        uint64_t end = (uint64_t)(i + 1) * p->count / s->count;

        s->rows[i] = (uint32_t)(begin + random_below(&random, end - begin));
    }
    pool_for(p->pool, s->count, p->block_rows, sample_range, s);
    return first_failure(p->failures, p->workers, err);
}

/* Means of the sampled rows at positions from begins[leaf] on; a leaf without any stays as it is.
 */
static void mean_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct sampling *s = context;
    const struct row_shape *shape = s->p->shape;

    (void)worker;
    for (uint64_t leaf = begin; leaf < end; leaf++) {
        float *mean = s->p->centroids + leaf * shape->space_dim;
        uint32_t from = s->begins[leaf], to = s->begins[leaf + 1];

        if (from == to)
            continue;
        memset(mean, 0, shape->space_dim * sizeof *mean);
        for (uint32_t i = from; i < to; i++) {
            const uint8_t *row = s->space + s->order[i] * shape->stride;

            if (shape->space_type == ELEMENT_F32)
                for (uint32_t d = 0; d < shape->space_dim; d++)
                    mean[d] += load_f32(row + 4ull * d);
            else if (shape->space_type == ELEMENT_U8)
                for (uint32_t d = 0; d < shape->space_dim; d++)
                    mean[d] += row[d];
            else
                for (uint32_t d = 0; d < shape->space_dim; d++)
                    mean[d] += (int8_t)row[d];
        }
        for (uint32_t d = 0; d < shape->space_dim; d++)
            mean[d] /= (float)(to - from);
    }
}

static void sample_find_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct sampling *s = context;
    struct partition *p = s->p;

    leaf_finder_find(p->finder, p->scratch[worker], s->space + begin * p->shape->stride,
                     (uint32_t)(end - begin), 1, s->leaves + begin);
}

static void finder_free(struct partition *p)
{
    for (uint32_t i = 0; p->scratch && i < p->workers; i++) {
        leaf_finder_scratch_free(p->scratch[i]);
        p->scratch[i] = NULL;
    }
    leaf_finder_free(p->finder);
    p->finder = NULL;
}

static int finder_new(struct partition *p, struct error *err)
{
    finder_free(p);
    if (leaf_finder_new(p->shape, p->centroids, p->leaf_count, &p->finder, err) < 0)
        return -1;
    for (uint32_t i = 0; i < p->workers; i++)
        if (leaf_finder_scratch_new(p->finder, p->block_rows, 1, &p->scratch[i], err) < 0)
            return -1;
    return 0;
}

/* Turns leaf numbers into places: leaf by leaf, within a leaf as they come. begins: leaf_count + 1.
 * What stood before a leaf's end is put right afterwards. */
static void count_places(uint32_t *leaves, uint32_t count, uint32_t *begins, uint32_t leaf_count)
{
    memset(begins, 0, (leaf_count + 1ull) * sizeof *begins);
    for (uint32_t i = 0; i < count; i++)
        begins[leaves[i] + 1]++;
    for (uint32_t leaf = 0; leaf < leaf_count; leaf++)
        begins[leaf + 1] += begins[leaf];
    for (uint32_t i = 0; i < count; i++)
        leaves[i] = begins[leaves[i]]++;
    /* Each beginning has moved to the next one's. */
    memmove(begins + 1, begins, leaf_count * sizeof *begins);
    begins[0] = 0;
}

/* One round of Lloyd on the sample. */
static int sample_improve(struct sampling *s, struct error *err)
{
    struct partition *p = s->p;

    if (finder_new(p, err) < 0)
        return -1;
    pool_for(p->pool, s->count, p->block_rows, sample_find_range, s);
    count_places(s->leaves, s->count, s->begins, p->leaf_count);
    for (uint32_t i = 0; i < s->count; i++)
        s->order[s->leaves[i]] = i;
    pool_for(p->pool, p->leaf_count, 64, mean_range, s);
    return 0;
}

static int centroids_write(struct partition *p, struct error *err)
{
    uint64_t bytes = (uint64_t)p->leaf_count * p->shape->space_dim * sizeof *p->centroids;
    char path[FILE_PATH_MAX];

    if (scratch_path(p, "centroids", path, err) < 0 ||
        file_publish(p->vfs, path, p->centroids, bytes, err) < 0 ||
        state_set(p, "partition.stage", STAGE_CENTROIDS, err) < 0 ||
        state_set(p, "partition.row", 0, err) < 0 ||
        state_set(p, "partition.centroids_crc", crc32c(0, p->centroids, bytes), err) < 0)
        return -1;
    return journal_commit(p->journal, err);
}

static int centroids_read(struct partition *p, struct error *err)
{
    uint64_t bytes = (uint64_t)p->leaf_count * p->shape->space_dim * sizeof *p->centroids;
    char path[FILE_PATH_MAX];
    struct vfs_file *file;
    uint64_t crc;
    int rc = -1;

    if (state_get(p, "partition.centroids_crc", UINT32_MAX, &crc, err) < 0 ||
        scratch_path(p, "centroids", path, err) < 0)
        return -1;
    file = row_store_open_scratch(p->vfs, path, VFS_READ, err);
    if (!file)
        return -1;
    if (file_read_exact(file, path, p->centroids, bytes, 0, err) < 0)
        goto done;
    if (crc32c(0, p->centroids, bytes) != crc) {
        error_set(err, ERR_CORRUPT, "%s: CRC-32C %08x, wanted %08x", path,
                  crc32c(0, p->centroids, bytes), (uint32_t)crc);
        goto done;
    }
    rc = 0;
done:
    file_close(file, path, NULL);
    return rc;
}

static int centroids_make(struct partition *p, struct error *err)
{
    struct sampling s = {.p = p, .count = sample_count_of(p->count)};
    const struct page_layout_params params = {.capacity = PARTITION_SAMPLE, .seed = p->seed};
    struct vector_matrix matrix;
    void *space = NULL;
    int rc = -1;

    job_phase(p->job, "sample", s.count);
    s.rows = malloc(s.count * sizeof *s.rows);
    s.order = malloc(s.count * sizeof *s.order);
    s.leaves = malloc(s.count * sizeof *s.leaves);
    s.begins = malloc((p->leaf_count + 1ull) * sizeof *s.begins);
    if (!s.rows || !s.order || !s.leaves || !s.begins ||
        posix_memalign(&space, 64, s.count * p->shape->stride) != 0) {
        error_set(err, ERR_NOMEM, "no memory for a sample of %u rows", s.count);
        goto done;
    }
    s.space = space;
    if (sample_rows(&s, err) < 0)
        goto done;
    matrix = (struct vector_matrix){s.space, p->shape->stride, s.count, p->shape->space_dim,
                                    p->shape->space_type};
    if (page_layout_order(&matrix, &params, p->pool, p->job, s.order, err) < 0)
        goto done;
    for (uint32_t leaf = 0; leaf <= p->leaf_count; leaf++) {
        uint64_t begin = (uint64_t)leaf * PARTITION_SAMPLE;

        s.begins[leaf] = begin < s.count ? (uint32_t)begin : s.count;
    }
    memset(p->centroids, 0, (uint64_t)p->leaf_count * p->shape->space_dim * sizeof *p->centroids);
    pool_for(p->pool, p->leaf_count, 64, mean_range, &s);
    if (sample_improve(&s, err) < 0)
        goto done;
    rc = centroids_write(p, err);
done:
    free(space);
    free(s.rows);
    free(s.order);
    free(s.leaves);
    free(s.begins);
    return rc;
}

/* ---- pass two: leaves ---- */

struct assigning {
    struct partition *p;
    uint64_t first; /* row that a round begins with */
};

static void assign_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct assigning *a = context;
    struct partition *p = a->p;
    const struct row_shape *shape = p->shape;
    struct failure *failure = &p->failures[worker];
    uint8_t *space = p->blocks + worker * p->block_bytes;
    uint64_t count = end - begin, first = a->first + begin;
    uint8_t *raw = space + count * (shape->stride - shape->raw_bytes);

    if (failure->err.code != ERR_NONE)
        return;
    failure->at = begin;
    if (vector_source_read(p->source, first, count, raw, &failure->err) < 0 ||
        job_advance(p->job, count, &failure->err) < 0)
        return;
    row_shape_convert(shape, raw, count, space);
    leaf_finder_find(p->finder, p->scratch[worker], space, (uint32_t)count, 1, p->places + first);
}

/* Of a round of leaf numbers, `first` the first row of it. */
static uint32_t round_crc(const struct partition *p, uint64_t first, uint64_t rows)
{
    return crc32c((uint32_t)(first / round_rows_of(p->shape)), p->places + first,
                  rows * sizeof *p->places);
}

static uint64_t round_offset(const struct partition *p, uint64_t first)
{
    return (first + first / round_rows_of(p->shape)) * sizeof(uint32_t);
}

static uint64_t round_rows(const struct partition *p, uint64_t first, uint64_t end)
{
    uint64_t rows = round_rows_of(p->shape);

    return end - first < rows ? end - first : rows;
}

/* Leaf numbers of rows [from, to), whole rounds or up to the last row, to disk. */
static int assigned_save(struct partition *p, struct vfs_file *file, const char *path,
                         uint64_t from, uint64_t to, struct error *err)
{
    while (from < to) {
        uint64_t rows = round_rows(p, from, to), bytes = rows * sizeof *p->places;
        uint64_t offset = round_offset(p, from);
        uint8_t crc[sizeof(uint32_t)];

        store_u32(crc, round_crc(p, from, rows));
        if (file_write_full(file, path, p->places + from, bytes, offset, err) < 0 ||
            file_write_full(file, path, crc, sizeof crc, offset + bytes, err) < 0)
            return -1;
        from += rows;
    }
    return file_sync(file, path, err);
}

/* The first `rows` leaf numbers back, checked. */
static int assigned_load(struct partition *p, struct vfs_file *file, const char *path,
                         uint64_t rows, struct error *err)
{
    for (uint64_t first = 0; first < rows;) {
        uint64_t count = round_rows(p, first, rows), bytes = count * sizeof *p->places;
        uint64_t offset = round_offset(p, first);
        uint8_t crc[sizeof(uint32_t)];

        if (file_read_exact(file, path, p->places + first, bytes, offset, err) < 0 ||
            file_read_exact(file, path, crc, sizeof crc, offset + bytes, err) < 0)
            return -1;
        if (round_crc(p, first, count) != load_u32(crc))
            return error_set(err, ERR_CORRUPT,
                             "%s: leaves of %" PRIu64 " rows from %" PRIu64 " on (byte %" PRIu64
                             "): CRC-32C %08x, wanted %08x",
                             path, count, first, offset, round_crc(p, first, count), load_u32(crc));
        first += count;
    }
    for (uint64_t i = 0; i < rows; i++)
        if (p->places[i] >= p->leaf_count)
            return error_set(err, ERR_CORRUPT, "%s: row %" PRIu64 " is of leaf %u, there are %u",
                             path, i, p->places[i], p->leaf_count);
    return 0;
}

/* "numbers", as many at a time as there is memory for, by a pass over all places each. */
static int numbers_write(struct partition *p, struct error *err)
{
    uint64_t at_once =
        p->spare / sizeof(uint32_t) < p->count ? p->spare / sizeof(uint32_t) : p->count;
    uint32_t *numbers = malloc(at_once * sizeof *numbers), crc = 0;
    uint8_t crc_bytes[sizeof crc];
    char path[FILE_PATH_MAX];
    struct vfs_file *file = NULL;
    int rc = -1;

    if (!numbers) {
        error_set(err, ERR_NOMEM, "no memory for %" PRIu64 " row numbers", at_once);
        goto done;
    }
    file = scratch_file(p, "numbers", false, path, err);
    if (!file)
        goto done;
    for (uint64_t first = 0; first < p->count; first += at_once) {
        uint64_t count = p->count - first < at_once ? p->count - first : at_once;

        for (uint32_t row = 0; row < p->count; row++)
            if (p->places[row] - first < count)
                numbers[p->places[row] - first] = row;
        if (file_write_full(file, path, numbers, count * sizeof *numbers, first * sizeof *numbers,
                            err) < 0)
            goto done;
        crc = crc32c(crc, numbers, count * sizeof *numbers);
    }
    store_u32(crc_bytes, crc);
    if (file_write_full(file, path, crc_bytes, sizeof crc_bytes, p->count * sizeof *numbers, err) <
        0)
        goto done;
    rc = file_sync(file, path, err);
done:
    if (file_close(file, path, rc == 0 ? err : NULL) < 0)
        rc = -1;
    free(numbers);
    return rc;
}

static int assign(struct partition *p, struct error *err)
{
    uint64_t saved;
    struct assigning a = {.p = p};
    char path[FILE_PATH_MAX], folder[FILE_PATH_MAX];
    struct vfs_file *file = NULL;
    int rc = -1;

    if (state_get(p, "partition.row", p->count, &saved, err) < 0)
        return -1;
    job_phase(p->job, "assign", p->count);
    file = scratch_file(p, "assigned", saved > 0, path, err);
    if (!file || assigned_load(p, file, path, saved, err) < 0 || finder_new(p, err) < 0 ||
        job_advance(p->job, saved, err) < 0)
        goto done;
    /* What is saved ends with a round or the input, so blocks are the same ones. */
    for (a.first = saved; a.first < p->count;) {
        uint64_t rows = round_rows(p, a.first, p->count);

        pool_for(p->pool, rows, p->block_rows, assign_range, &a);
        if (first_failure(p->failures, p->workers, err) < 0)
            goto done;
        a.first += rows;
        if (!journal_commit_due(p->journal) || a.first == p->count)
            continue;
        if (assigned_save(p, file, path, saved, a.first, err) < 0 ||
            state_set(p, "partition.row", a.first, err) < 0 || journal_commit(p->journal, err) < 0)
            goto done;
        saved = a.first;
    }
    if (assigned_save(p, file, path, saved, p->count, err) < 0)
        goto done;
    finder_free(p);
    count_places(p->places, p->count, p->leaf_begins, p->leaf_count);
    file_path_folder(folder, path);
    if (numbers_write(p, err) < 0 ||
        row_store_write_leaves(p->vfs, folder, p->shape, p->count, p->leaf_count, p->leaf_begins,
                               p->centroids, err) < 0 ||
        state_set(p, "partition.stage", STAGE_ASSIGNED, err) < 0 ||
        state_set(p, "partition.row", 0, err) < 0)
        goto done;
    rc = journal_commit(p->journal, err);
done:
    if (file_close(file, path, rc == 0 ? err : NULL) < 0)
        rc = -1;
    return rc;
}

/* Places as the call before left them. */
static int places_load(struct partition *p, struct error *err)
{
    char path[FILE_PATH_MAX];
    struct vfs_file *file;
    int rc;

    if (scratch_path(p, "assigned", path, err) < 0)
        return -1;
    file = row_store_open_scratch(p->vfs, path, VFS_READ, err);
    if (!file)
        return -1;
    rc = assigned_load(p, file, path, p->count, err);
    file_close(file, path, NULL);
    if (rc == 0)
        count_places(p->places, p->count, p->leaf_begins, p->leaf_count);
    return rc;
}

/* ---- pass three ---- */

/* How far the rows are placed, as the state has it. Numbers of places but `row` and `files`. */
struct progress {
    uint64_t place;  /* all before are in "rows" */
    uint64_t bucket; /* a bucket's; 0: no pass is open */
    uint64_t files;  /* buckets of the pass */
    uint64_t pass;   /* the pass's first */
    uint64_t row;    /* of the input: those before are in the buckets of the pass */
};

struct placing {
    struct partition *p;
    struct progress at;
    struct vfs_file *rows;
    char path[FILE_PATH_MAX];
    /* What a loop is about: */
    uint8_t *image; /* records of places [first, first + count) as "rows" has them */
    uint64_t first;
    uint64_t count;
    struct vfs_file *file; /* a bucket */
    char file_path[FILE_PATH_MAX];
    uint64_t read_row; /* `blocks` has the rows from here on, then their checksums */
    uint8_t *read_crcs;
};

static int progress_get(struct partition *p, struct progress *at, struct error *err)
{
    if (state_get(p, "partition.place", p->count, &at->place, err) < 0 ||
        state_get(p, "partition.bucket", p->count, &at->bucket, err) < 0 ||
        state_get(p, "partition.files", BUCKETS_MAX, &at->files, err) < 0 ||
        state_get(p, "partition.pass", at->place, &at->pass, err) < 0 ||
        state_get(p, "partition.row", p->count, &at->row, err) < 0)
        return -1;
    return 0;
}

static int progress_commit(struct placing *g, struct error *err)
{
    struct partition *p = g->p;

    if (state_set(p, "partition.place", g->at.place, err) < 0 ||
        state_set(p, "partition.bucket", g->at.bucket, err) < 0 ||
        state_set(p, "partition.files", g->at.files, err) < 0 ||
        state_set(p, "partition.pass", g->at.pass, err) < 0 ||
        state_set(p, "partition.row", g->at.row, err) < 0)
        return -1;
    return journal_commit(p->journal, err);
}

static int image_new(struct placing *g, uint64_t first, uint64_t count, struct error *err)
{
    uint64_t bytes = count * row_store_record_bytes(g->p->shape);
    void *image = NULL;

    g->first = first;
    g->count = count;
    if (posix_memalign(&image, bytes >= HUGE_BYTES ? HUGE_BYTES : 64, bytes) != 0)
        return error_set(err, ERR_NOMEM, "no memory for %" PRIu64 " rows", count);
    madvise(image, bytes, MADV_HUGEPAGE); /* advice: nothing depends on it */
    g->image = image;
    return 0;
}

/* The image to its place in "rows", durably. */
static int image_write(struct placing *g, struct error *err)
{
    uint64_t record = row_store_record_bytes(g->p->shape), end = g->count * record;

    for (uint64_t at = 0; at < end; at += WRITE_BYTES) {
        uint64_t bytes = end - at < WRITE_BYTES ? end - at : WRITE_BYTES;

        if (file_write_full(g->rows, g->path, g->image + at, bytes, g->first * record + at, err) <
                0 ||
            job_advance(g->p->job, 0, err) < 0)
            return -1;
    }
    free(g->image);
    g->image = NULL;
    return file_sync(g->rows, g->path, err);
}

static void image_put(struct placing *g, uint64_t at, const uint8_t *raw, uint32_t crc)
{
    const struct row_shape *shape = g->p->shape;
    uint8_t *record = g->image + at * row_store_record_bytes(shape);

    memcpy(record, raw, shape->raw_bytes);
    store_u32(record + shape->raw_bytes, crc);
}

static void place_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct placing *g = context;
    struct partition *p = g->p;
    struct failure *failure = &p->failures[worker];
    uint8_t *rows = p->blocks + worker * p->block_bytes;
    uint64_t raw = p->shape->raw_bytes;

    if (failure->err.code != ERR_NONE)
        return;
    failure->at = begin;
    if (vector_source_read(p->source, begin, end - begin, rows, &failure->err) < 0 ||
        job_advance(p->job, end - begin, &failure->err) < 0)
        return;
    for (uint64_t row = begin; row < end; row++) {
        uint64_t place = p->places[row] - g->first;
        const uint8_t *raw_row = rows + (row - begin) * raw;

        if (place < g->count)
            image_put(g, place, raw_row, row_store_crc(p->shape, p->places[row], raw_row));
    }
}

/* All that is left, in memory. */
static int place_in_memory(struct placing *g, struct error *err)
{
    struct partition *p = g->p;

    if (image_new(g, g->at.place, p->count - g->at.place, err) < 0)
        return -1;
    pool_for(p->pool, p->count, p->block_rows, place_range, g);
    if (first_failure(p->failures, p->workers, err) < 0 || image_write(g, err) < 0)
        return -1;
    g->at = (struct progress){.place = p->count};
    return progress_commit(g, err);
}

/* ---- pass three: buckets ---- */

struct bucket {
    struct vfs_file *file;
    uint64_t offset; /* in the file: what is written */
    uint64_t bytes;  /* in the buffer */
    uint64_t number; /* of the next record */
    uint8_t *buffer; /* BUCKET_BUFFER and a record */
};

static int bucket_flush(struct bucket *bucket, uint32_t number, struct error *err)
{
    char name[24];

    bucket_name(number, name);
    if (file_write_full(bucket->file, name, bucket->buffer, bucket->bytes, bucket->offset, err) < 0)
        return -1;
    bucket->offset += bucket->bytes;
    bucket->bytes = 0;
    return 0;
}

/* Commits that all rows before `row` are in the buckets. */
static int spread_commit(struct placing *g, struct bucket *buckets, uint64_t row, struct error *err)
{
    for (uint32_t i = 0; i < g->at.files; i++) {
        char name[24];

        bucket_name(i, name);
        if (bucket_flush(&buckets[i], i, err) < 0 || file_sync(buckets[i].file, name, err) < 0)
            return -1;
    }
    g->at.row = row;
    return progress_commit(g, err);
}

static void read_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct placing *g = context;
    struct partition *p = g->p;
    struct failure *failure = &p->failures[worker];
    uint64_t raw = p->shape->raw_bytes;

    if (failure->err.code != ERR_NONE)
        return;
    failure->at = begin;
    if (vector_source_read(p->source, g->read_row + begin, end - begin, p->blocks + begin * raw,
                           &failure->err) < 0)
        return;
    for (uint64_t i = begin; i < end; i++)
        store_u32(g->read_crcs + i * ROW_STORE_CRC_BYTES,
                  row_store_crc(p->shape, p->places[g->read_row + i], p->blocks + i * raw));
}

/* What stands at the end of a bucket's record. */
static uint32_t record_crc(uint32_t row_crc, uint64_t number)
{
    uint8_t bytes[sizeof(uint32_t)];

    store_u32(bytes, (uint32_t)number);
    return crc32c(row_crc, bytes, sizeof bytes);
}

/* Appends rows [first, first + count), which `blocks` holds, to their buckets. */
static int spread_rows(struct placing *g, struct bucket *buckets, uint64_t first, uint64_t count,
                       struct error *err)
{
    struct partition *p = g->p;
    uint64_t raw = p->shape->raw_bytes, span = g->at.files * g->at.bucket;

    for (uint64_t i = 0; i < count; i++) {
        uint64_t place = p->places[first + i] - g->at.pass;
        struct bucket *bucket;
        uint8_t *record;

        if (place >= span) /* of another pass, before or after */
            continue;
        bucket = &buckets[place / g->at.bucket];
        record = bucket->buffer + bucket->bytes;
        store_u32(record, p->places[first + i]);
        memcpy(record + sizeof(uint32_t), p->blocks + i * raw, raw);
        store_u32(record + sizeof(uint32_t) + raw,
                  record_crc(load_u32(g->read_crcs + i * ROW_STORE_CRC_BYTES), bucket->number++));
        bucket->bytes += record_bytes_of(p->shape);
        if (bucket->bytes >= BUCKET_BUFFER &&
            bucket_flush(bucket, (uint32_t)(bucket - buckets), err) < 0)
            return -1;
    }
    return job_advance(p->job, count, err);
}

static int buckets_open(struct placing *g, struct bucket *buckets, struct error *err)
{
    struct partition *p = g->p;
    uint64_t record = record_bytes_of(p->shape), span = g->at.files * g->at.bucket;

    for (uint32_t i = 0; i < g->at.files; i++) {
        char name[24], path[FILE_PATH_MAX];

        bucket_name(i, name);
        buckets[i].buffer = malloc(BUCKET_BUFFER + record);
        if (!buckets[i].buffer)
            return error_set(err, ERR_NOMEM, "no memory for the buffers of %" PRIu64 " buckets",
                             g->at.files);
        buckets[i].file = scratch_file(p, name, g->at.row > 0, path, err);
        if (!buckets[i].file)
            return -1;
    }
    for (uint64_t row = 0; row < g->at.row; row++) {
        uint64_t place = p->places[row] - g->at.pass;

        if (place < span)
            buckets[place / g->at.bucket].number++;
    }
    for (uint32_t i = 0; i < g->at.files; i++)
        buckets[i].offset = buckets[i].number * record;
    return 0;
}

/* One pass over the input from at.row on: all rows whose places the pass has into its buckets. */
static int spread(struct placing *g, struct error *err)
{
    struct partition *p = g->p;
    struct bucket *buckets = calloc(g->at.files, sizeof *buckets);
    uint64_t rows_max = p->workers * p->block_bytes / row_store_record_bytes(p->shape);
    int rc = -1;

    if (!buckets) {
        error_set(err, ERR_NOMEM, "no memory for %" PRIu64 " buckets", g->at.files);
        goto done;
    }
    if (buckets_open(g, buckets, err) < 0)
        goto done;
    g->read_crcs = p->blocks + rows_max * p->shape->raw_bytes;
    for (uint64_t row = g->at.row; row < p->count;) {
        uint64_t rows = p->count - row < rows_max ? p->count - row : rows_max;

        g->read_row = row;
        pool_for(p->pool, rows, p->block_rows, read_range, g);
        if (first_failure(p->failures, p->workers, err) < 0 ||
            spread_rows(g, buckets, row, rows, err) < 0)
            goto done;
        row += rows;
        if ((row == p->count || journal_commit_due(p->journal)) &&
            spread_commit(g, buckets, row, err) < 0)
            goto done;
    }
    rc = 0;
done:
    for (uint32_t i = 0; buckets && i < g->at.files; i++) {
        char name[24];

        bucket_name(i, name);
        if (file_close(buckets[i].file, name, rc == 0 ? err : NULL) < 0)
            rc = -1;
        free(buckets[i].buffer);
    }
    free(buckets);
    return rc;
}

static void load_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct placing *g = context;
    struct partition *p = g->p;
    struct failure *failure = &p->failures[worker];
    uint64_t raw = p->shape->raw_bytes, bytes = record_bytes_of(p->shape);
    uint8_t *records = p->blocks + worker * p->block_bytes;

    if (failure->err.code != ERR_NONE)
        return;
    failure->at = begin;
    if (file_read_exact(g->file, g->file_path, records, (end - begin) * bytes, begin * bytes,
                        &failure->err) < 0 ||
        job_advance(p->job, end - begin, &failure->err) < 0)
        return;
    for (uint64_t i = 0; i < end - begin; i++) {
        const uint8_t *record = records + i * bytes, *row = record + sizeof(uint32_t);
        uint32_t place = load_u32(record), row_crc = row_store_crc(p->shape, place, row);
        uint32_t crc = record_crc(row_crc, begin + i), wanted = load_u32(row + raw);
        const char *path = g->file_path;

        if (crc != wanted) {
            error_set(&failure->err, ERR_CORRUPT,
                      "%s: record %" PRIu64 " (byte %" PRIu64 "): CRC-32C %08x, wanted %08x", path,
                      begin + i, (begin + i) * bytes, crc, wanted);
            return;
        }
        if (place - g->first >= g->count) {
            error_set(&failure->err, ERR_CORRUPT,
                      "%s: record %" PRIu64 " is for place %u, %" PRIu64 " from %" PRIu64
                      " on were wanted",
                      path, begin + i, place, g->count, g->first);
            return;
        }
        image_put(g, place - g->first, row, row_crc);
    }
}

/* The bucket that begins at at.place. */
static int bucket_place(struct placing *g, struct error *err)
{
    struct partition *p = g->p;
    uint64_t end = g->at.pass + g->at.files * g->at.bucket, count = p->count - g->at.place;
    uint32_t number = (uint32_t)((g->at.place - g->at.pass) / g->at.bucket);
    char name[24];
    int rc = -1;

    count = count < g->at.bucket ? count : g->at.bucket;
    bucket_name(number, name);
    if (scratch_path(p, name, g->file_path, err) < 0 || image_new(g, g->at.place, count, err) < 0)
        return -1;
    g->file = row_store_open_scratch(p->vfs, g->file_path, VFS_READ, err);
    if (!g->file)
        return -1;
    pool_for(p->pool, count, p->block_bytes / record_bytes_of(p->shape), load_range, g);
    if (first_failure(p->failures, p->workers, err) < 0 || image_write(g, err) < 0)
        goto done;
    g->at.place += count;
    if (g->at.place >= end || g->at.place == p->count)
        g->at = (struct progress){.place = g->at.place};
    rc = progress_commit(g, err);
done:
    file_close(g->file, g->file_path, NULL);
    g->file = NULL;
    return rc < 0 ? -1 : scratch_remove(p, name, err);
}

static int place(struct partition *p, struct error *err)
{
    struct placing g = {.p = p};
    uint64_t bucket = p->spare / row_store_record_bytes(p->shape), files = p->spare / BUCKET_BUFFER;
    bool direct;
    int rc = -1;

    if (progress_get(p, &g.at, err) < 0)
        return -1;
    /* A pass that was open under a larger grant does not go on under this one. */
    if (g.at.bucket > bucket || g.at.files > files || g.at.files == 0)
        g.at = (struct progress){.place = g.at.place};
    direct = g.at.bucket == 0 && p->count - g.at.place <= bucket;
    job_phase(p->job, "place", direct ? p->count : 2ull * p->count);
    g.rows = scratch_file(p, "rows", g.at.place > 0, g.path, err);
    if (!g.rows)
        goto done;
    while (g.at.place < p->count) {
        uint64_t left = p->count - g.at.place;

        if (g.at.bucket == 0 && left <= bucket) {
            if (place_in_memory(&g, err) < 0)
                goto done;
            continue;
        }
        if (g.at.bucket == 0) {
            uint64_t wanted = (left + bucket - 1) / bucket;

            g.at.bucket = bucket;
            g.at.files = wanted < files ? wanted : files;
            g.at.files = g.at.files < BUCKETS_MAX ? g.at.files : BUCKETS_MAX;
            g.at.pass = g.at.place;
        }
        if (g.at.row < p->count && spread(&g, err) < 0)
            goto done;
        if (bucket_place(&g, err) < 0)
            goto done;
    }
    rc =
        state_set(p, "partition.stage", STAGE_DONE, err) < 0 ? -1 : journal_commit(p->journal, err);
done:
    free(g.image);
    if (file_close(g.rows, g.path, rc == 0 ? err : NULL) < 0)
        rc = -1;
    return rc;
}

/* ---- all of it ---- */

/* What only an unfinished partition needs. */
static int litter_remove(struct partition *p, struct error *err)
{
    if (scratch_remove(p, "assigned", err) < 0 || scratch_remove(p, "centroids", err) < 0)
        return -1;
    for (uint32_t i = 0; i < BUCKETS_MAX; i++) {
        char name[24];

        bucket_name(i, name);
        if (scratch_remove(p, name, err) < 0)
            return -1;
    }
    return 0;
}

static int prepare(struct partition *p, struct error *err)
{
    void *blocks = NULL;

    p->failures = calloc(p->workers, sizeof *p->failures);
    p->scratch = calloc(p->workers, sizeof *p->scratch);
    p->centroids = malloc((uint64_t)p->leaf_count * p->shape->space_dim * sizeof *p->centroids);
    p->leaf_begins = malloc((p->leaf_count + 1ull) * sizeof *p->leaf_begins);
    if (!p->failures || !p->scratch || !p->centroids || !p->leaf_begins ||
        posix_memalign(&blocks, 64, p->workers * p->block_bytes) != 0)
        return error_set(err, ERR_NOMEM, "no memory for the leaves of %u rows", p->count);
    p->blocks = blocks;
    return 0;
}

static int run(struct partition *p, enum stage stage, struct error *err)
{
    if (stage == STAGE_NONE && centroids_make(p, err) < 0)
        return -1;
    p->places = malloc((uint64_t)p->count * sizeof *p->places);
    if (!p->places)
        return error_set(err, ERR_NOMEM, "no memory for the places of %u rows", p->count);
    if (stage == STAGE_CENTROIDS && centroids_read(p, err) < 0)
        return -1;
    if ((stage == STAGE_ASSIGNED ? places_load(p, err) : assign(p, err)) < 0)
        return -1;
    return place(p, err);
}

int partition_make(struct vfs *vfs, const struct vector_source *source,
                   const struct row_shape *shape, uint64_t seed, uint64_t memory_bytes,
                   struct journal *journal, struct pool *pool, struct job *job, struct error *err)
{
    uint64_t count = vector_source_rows(source), stage, fixed;
    struct partition p = {.vfs = vfs,
                          .source = source,
                          .shape = shape,
                          .seed = seed,
                          .journal = journal,
                          .pool = pool,
                          .job = job,
                          .workers = pool_workers(pool),
                          .count = (uint32_t)count,
                          .leaf_count = leaf_count_of(count),
                          .block_rows = block_rows_of(shape),
                          .block_bytes = block_bytes_of(shape)};
    int rc = -1;

    assert(count > 0 && count < UINT32_MAX && vector_source_type(source) == shape->element &&
           vector_source_dim(source) == shape->dim);
    if (memory_bytes < partition_memory_min(shape, count, p.workers))
        return error_set(err, ERR_BUDGET,
                         "putting %" PRIu64 " rows in order takes %" PRIu64
                         " bytes of memory at least, %" PRIu64 " were granted",
                         count, partition_memory_min(shape, count, p.workers), memory_bytes);
    fixed = place_memory(shape, count, p.workers) +
            (uint64_t)p.leaf_count * shape->space_dim * sizeof(float);
    p.spare = memory_bytes - fixed;
    p.spare = p.spare < SPARE_MAX ? p.spare : SPARE_MAX;
    if (state_get(&p, "partition.stage", STAGE_DONE, &stage, err) < 0)
        goto done;
    if (stage == STAGE_DONE) {
        rc = litter_remove(&p, err);
        goto done;
    }
    if (prepare(&p, err) < 0 || run(&p, (enum stage)stage, err) < 0)
        goto done;
    rc = litter_remove(&p, err);
done:
    finder_free(&p);
    free(p.scratch);
    free(p.failures);
    free(p.blocks);
    free(p.centroids);
    free(p.leaf_begins);
    free(p.places);
    return rc;
}
