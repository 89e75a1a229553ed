/* How it works: every stage asks the journal's state whether it is done, does its work from scratch
 * files to scratch files, and commits. Inside the long ones (partition, graph, sections) the
 * modules commit themselves, every quarter of a minute. A stage's scratch files go when no later
 * stage needs them. */
#include "index/segment_build.h"

#include <assert.h>
#include <inttypes.h>
#include <malloc.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/build_plan.h"
#include "index/calibrate.h"
#include "index/flat.h"
#include "index/leaf_graph.h"
#include "index/neighbour_lists.h"
#include "index/partition.h"
#include "index/segment_parts.h"
#include "storage/base/bytes.h"
#include "storage/base/random.h"
#include "storage/file.h"

#define FORMAT_VERSION 2u
#define SAMPLE_ROWS 65536u
#define ROWS_MIN 256u
#define INSERT_ROWS 8192u /* fewer are inserted unless asked otherwise: a leaf is 128 */
#define REFINE_ROUNDS 6u
#define LIST_ROWS 256u /* neighbour lists moved at once */
#define CELL_ROWS 72u  /* about, in whole pages: finer cells cost memory, coarser ones scans */
#define TIER_ROWS_MIN 1000u
#define QUERIES_MAX 1000u /* rows left out of the order to calibrate with */
#define QUERIES_MIN 100u  /* fewer say little about a recall of 0.99 */
#define QUERY_SHARE 50u   /* one row in so many at most */
#define TRUTH_K 100u

static bool is_float(enum element_type type)
{
    return type == ELEMENT_F32;
}

static uint32_t code_bytes_default(uint32_t dim)
{
    uint32_t bytes = dim / 4;

    bytes = bytes < 16 ? 16 : bytes > 192 ? 192 : bytes;
    return bytes > dim ? dim : bytes;
}

int segment_build_params_check(const struct vector_source *source,
                               struct segment_build_params *params, struct error *err)
{
    enum element_type element = vector_source_type(source);
    uint32_t dim = vector_source_dim(source);
    uint64_t rows = vector_source_rows(source);

    if (element != ELEMENT_F32 && element != ELEMENT_U8 && element != ELEMENT_I8)
        return error_set(err, ERR_UNSUPPORTED, "%s holds %s vectors; build takes f32, u8 and i8",
                         vector_source_name(source), element_name(element));
    if (rows < ROWS_MIN)
        return error_set(err, ERR_INVALID,
                         "%s has %" PRIu64 " rows; training the codes needs at least %u",
                         vector_source_name(source), rows, ROWS_MIN);
    if (rows > UINT32_MAX - 1)
        return error_set(err, ERR_INVALID, "%s has %" PRIu64 " rows; a segment holds at most %u",
                         vector_source_name(source), rows, UINT32_MAX - 1);
    if (dim >= DISTANCE_DIM_MAX)
        return error_set(err, ERR_INVALID, "%s has %u dimensions; at most %u are supported",
                         vector_source_name(source), dim, DISTANCE_DIM_MAX - 1);
    if (!params->code_bytes)
        params->code_bytes = code_bytes_default(dim);
    if (params->code_bytes > dim + 1)
        return error_set(err, ERR_INVALID,
                         "--code-bytes %u exceeds the dimension %u and a byte for the distortion",
                         params->code_bytes, dim);
    if (!params->store)
        params->store = is_float(element) ? STORE_F16 : element == ELEMENT_U8 ? STORE_U8 : STORE_I8;
    if (!is_float(element) && params->store != (element == ELEMENT_U8 ? STORE_U8 : STORE_I8))
        return error_set(err, ERR_INVALID,
                         "%s holds %s vectors, which are stored as they are; --store %s is for "
                         "float input",
                         vector_source_name(source), element_name(element),
                         store_name((enum vector_store)params->store));
    if (is_float(element) && params->store != STORE_F32 && params->store != STORE_F16 &&
        params->store != STORE_SQ8)
        return error_set(err, ERR_INVALID,
                         "%s holds f32 vectors, which --store %s cannot hold; wanted f32, f16 or "
                         "8bit",
                         vector_source_name(source), store_name((enum vector_store)params->store));
    if (params->builder == GRAPH_BUILDER_AUTO)
        params->builder = rows < INSERT_ROWS ? GRAPH_BUILDER_INSERT : GRAPH_BUILDER_BATCH;
    if (params->max_degree < 4 || params->max_degree > PAGE_DEGREE_MAX)
        return error_set(err, ERR_INVALID, "--max-degree %u is outside 4..%u", params->max_degree,
                         PAGE_DEGREE_MAX);
    if (params->build_list < params->max_degree / 2 || params->build_list > 4096)
        return error_set(err, ERR_INVALID,
                         "--build-list %u is outside %u..4096 (half the max degree at least)",
                         params->build_list, params->max_degree / 2);
    return 0;
}

/* ---- the journal's state ---- */

static bool state_has(const struct build *b, const char *name)
{
    return manifest_has(journal_state(b->journal), name);
}

static int state_done(struct build *b, const char *name, struct error *err)
{
    if (manifest_set_u64(journal_state(b->journal), name, 1, err) < 0)
        return -1;
    return journal_commit(b->journal, err);
}

static int scratch_remove(struct build *b, const char *name, struct error *err)
{
    char path[FILE_PATH_MAX];

    if (journal_scratch_path(b->journal, name, path, err) < 0)
        return -1;
    return file_remove_all(b->vfs, path, err);
}

/* A file of the scratch folder, synced: the bytes and their CRC-32C. */
static int scratch_write(struct build *b, const char *name, const void *data, uint64_t bytes,
                         struct error *err)
{
    uint32_t crc = crc32c(0, data, bytes);
    char path[FILE_PATH_MAX];
    struct vfs_file *file;
    int rc = -1;

    if (scratch_remove(b, name, err) < 0 || journal_scratch_path(b->journal, name, path, err) < 0)
        return -1;
    file = file_open(b->vfs, path, VFS_WRITE | VFS_CREATE, err);
    if (file && file_write_full(file, path, data, bytes, 0, err) == 0 &&
        file_write_full(file, path, &crc, sizeof crc, bytes, err) == 0 &&
        file_sync(file, path, err) == 0)
        rc = 0;
    if (file_close(file, path, rc < 0 ? NULL : err) < 0)
        rc = -1;
    return rc;
}

/* What scratch_write() wrote; malloc'ed. wanted: bytes it must have, 0 for any number. */
static int scratch_read(struct build *b, const char *name, uint64_t wanted, uint8_t **out,
                        uint64_t *bytes, struct error *err)
{
    char path[FILE_PATH_MAX];
    struct vfs_file *file = NULL;
    uint8_t *data = NULL;
    uint64_t size;
    uint32_t crc;
    int rc = -1;

    if (journal_scratch_path(b->journal, name, path, err) < 0)
        return -1;
    file = file_open(b->vfs, path, VFS_READ, err);
    if (!file || file_size(file, path, &size, err) < 0)
        goto done;
    if (size < sizeof crc || (wanted && size != wanted + sizeof crc)) {
        error_set(err, ERR_CORRUPT, "%s has %" PRIu64 " bytes, which it cannot have", path, size);
        goto done;
    }
    size -= sizeof crc;
    data = malloc(size + 1);
    if (!data) {
        error_set(err, ERR_NOMEM, "no memory for %" PRIu64 " bytes of %s", size, path);
        goto done;
    }
    if (file_read_exact(file, path, data, size, 0, err) < 0 ||
        file_read_exact(file, path, &crc, sizeof crc, size, err) < 0)
        goto done;
    if (crc != crc32c(0, data, size)) {
        error_set(err, ERR_CORRUPT, "%s fails its checksum", path);
        goto done;
    }
    *out = data;
    *bytes = size;
    data = NULL;
    rc = 0;
done:
    free(data);
    file_close(file, path, NULL);
    return rc;
}

/* ---- inspect ---- */

/* Digest, zeros and norms of the input; refuses what is not finite. */
static int stage_inspect(struct build *b, struct error *err)
{
    struct manifest *state = journal_state(b->journal);
    struct partition_facts facts;
    const uint8_t *digest;
    double norm_max;
    size_t bytes;

    if (!state_has(b, "inspect.sha256")) {
        if (duplicates_refuse(b, err) < 0 ||
            partition_inspect(b->source, &b->shape, b->pool, b->job, &facts, err) < 0 ||
            manifest_set_u64(state, "inspect.zero_vectors", facts.zero_vectors, err) < 0 ||
            manifest_set_f64(state, "inspect.norm_max", (double)facts.norm_max, err) < 0 ||
            manifest_set_u64(state, "plan.window_rows", b->window_rows, err) < 0 ||
            manifest_set_bytes(state, "inspect.sha256", facts.digest, DIGEST_BYTES, err) < 0 ||
            journal_commit(b->journal, err) < 0)
            return -1;
    }
    if (manifest_get_u64(state, "inspect.zero_vectors", &b->result->zero_vectors, err) < 0 ||
        manifest_get_f64(state, "inspect.norm_max", &norm_max, err) < 0 ||
        manifest_get_bytes(state, "inspect.sha256", &digest, &bytes, err) < 0)
        return -1;
    if (bytes != DIGEST_BYTES)
        return error_set(err, ERR_CORRUPT, "the build's state has a damaged digest");
    memcpy(b->input_digest, digest, DIGEST_BYTES);
    b->shape.norm_max = (float)norm_max;
    return 0;
}

/* What an earlier run decided by its memory holds: the order's windows are part of the bytes. */
static int plan_decide(struct build *b, struct error *err)
{
    struct manifest *state = journal_state(b->journal);
    struct build_plan plan;
    uint64_t window_rows;

    build_plan_make(&b->shape, b->count, &b->params, b->pool ? pool_workers(b->pool) : 1, &plan);
    if (build_plan_check(&plan, vector_source_name(b->source), b->params.memory_bytes, err) < 0)
        return -1;
    b->hold = plan.hold;
    b->window_rows = plan.window_rows;
    if (!state_has(b, "plan.window_rows"))
        return 0;
    if (manifest_get_u64_in(state, "plan.window_rows", 0, UINT32_MAX, &window_rows, err) < 0)
        return -1;
    if (plan.window_rows && (window_rows == 0 || window_rows > plan.window_rows))
        return error_set(err, ERR_BUDGET,
                         "this build was begun with more memory, and what it makes depends on it: "
                         "go on with --memory as it was");
    b->window_rows = (uint32_t)window_rows;
    return 0;
}

/* ---- train ---- */

static int trials_keep(struct build *b, const struct code_bake_off *bake_off, struct error *err);

static int train(struct build *b, struct error *err)
{
    uint32_t count = b->count < SAMPLE_ROWS ? b->count : SAMPLE_ROWS;
    float *sample = malloc((uint64_t)count * b->dim * sizeof *sample);
    uint32_t *shuffle = malloc(count * sizeof *shuffle);
    struct code_bake_off bake_off = {0};
    struct random random;
    uint8_t *bytes = NULL;
    size_t size;
    int rc = -1;

    job_phase(b->job, "train", 0);
    if (!sample || !shuffle) {
        error_set(err, ERR_NOMEM, "no memory for a training sample of %u rows", count);
        goto done;
    }
    random_init(&random, b->params.seed, 1);
    /* One row from each of `count` equal stretches, in shuffled order: the quantiser holds out the
     * sample's end, which must be no stretch of the file. */
    random_permutation(&random, shuffle, count);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t begin = (uint64_t)i * b->count / count;
        uint64_t end = (uint64_t)(i + 1) * b->count / count;
        float *vector = sample + (uint64_t)shuffle[i] * b->dim;

        if (vector_source_read_f32(b->source, begin + random_below(&random, end - begin), 1, vector,
                                   err) < 0)
            goto done;
        if (b->params.metric == METRIC_COSINE)
            vector_normalise(vector, b->dim);
    }
    const struct quantiser_params code = {
        b->params.code,
        /* An inner product's estimate has no distortion to correct. */
        b->params.metric == METRIC_IP && b->params.own_distortion == CHOICE_AUTO
            ? CHOICE_NO
            : b->params.own_distortion,
        b->params.code_bytes, b->params.seed};

    if (quantiser_train(&code, sample, count, b->dim, b->pool, b->job, &b->quantiser, &bake_off,
                        err) < 0 ||
        trials_keep(b, &bake_off, err) < 0 ||
        quantiser_encode_bytes(b->quantiser, &bytes, &size, err) < 0 ||
        scratch_write(b, "quantiser", bytes, size, err) < 0)
        goto done;
    rc = state_done(b, "train.done", err);
done:
    free(bytes);
    free(shuffle);
    free(sample);
    return rc;
}

static int stage_train(struct build *b, struct error *err)
{
    uint8_t *bytes = NULL;
    uint64_t size;
    int rc;

    if (!state_has(b, "train.done"))
        return train(b, err);
    if (scratch_read(b, "quantiser", 0, &bytes, &size, err) < 0)
        return -1;
    rc = quantiser_decode_bytes(bytes, size, "scratch/quantiser", &b->quantiser, err);
    free(bytes);
    return rc;
}

/* ---- graph ---- */

/* Lists in memory written as leaf_graph.h leaves them. */
static int lists_fill(struct build *b, const struct neighbour_lists *lists, struct error *err)
{
    uint32_t words = graph_record_words(LEAF_GRAPH_LIST_PLACES);
    uint32_t *records = calloc((uint64_t)LIST_ROWS * words, sizeof *records);
    struct graph_store *store = NULL;
    int rc = -1;

    if (!records) {
        error_set(err, ERR_NOMEM, "no memory for neighbour lists");
        goto done;
    }
    if (graph_store_open(b->vfs, b->journal, "lists", b->count, LEAF_GRAPH_LIST_PLACES, true,
                         &store, err) < 0)
        goto done;
    for (uint32_t first = 0; first < b->count; first += LIST_ROWS) {
        uint32_t rows = b->count - first < LIST_ROWS ? b->count - first : LIST_ROWS;

        for (uint32_t i = 0; i < rows; i++) {
            const uint32_t *list = lists->rows + (uint64_t)(first + i) * lists->k;
            uint32_t *record = records + (uint64_t)i * words, count = 0;

            memset(record, 0, words * sizeof *record);
            for (; count < lists->k && list[count] != NEIGHBOUR_NONE; count++)
                record[1 + count] = list[count];
            record[0] = count;
        }
        if (graph_store_write(store, first, rows, records, err) < 0)
            goto done;
    }
    rc = graph_store_sync(store, err);
done:
    graph_store_close(store);
    free(records);
    return rc;
}

/* By insertion, in memory: the lists come from the finished graph. */
static int graph_insert(struct build *b, struct error *err)
{
    const struct vamana_params params = {b->params.max_degree, b->params.build_list,
                                         b->params.alpha, b->params.seed};
    const struct vector_matrix matrix = row_store_matrix(b->row_store);
    struct neighbour_lists lists = {0};
    struct graph_store *store = NULL;
    struct graph *graph = NULL;
    int rc = -1;

    job_phase(b->job, "graph", b->count);
    if (vamana_build(&matrix, &params, b->pool, b->job, &graph, err) < 0 ||
        neighbour_lists_make(&matrix, graph, LEAF_GRAPH_LIST_PLACES, b->pool, b->job, &lists, err) <
            0 ||
        graph_store_open(b->vfs, b->journal, "graph", b->count, b->params.max_degree, true, &store,
                         err) < 0 ||
        graph_store_fill(store, graph, err) < 0 || graph_store_sync(store, err) < 0)
        goto done;
    rc = lists_fill(b, &lists, err);
done:
    neighbour_lists_release(&lists);
    graph_store_close(store);
    graph_free(graph);
    return rc;
}

static int graph_make(struct build *b, struct error *err)
{
    const struct leaf_graph_params params = {b->params.max_degree, b->params.alpha, b->params.seed,
                                             0, 0};
    int rc;

    if (b->hold && row_store_hold(b->row_store, b->pool, err) < 0)
        return -1;
    if (b->params.builder == GRAPH_BUILDER_INSERT)
        rc = graph_insert(b, err);
    else
        rc = leaf_graph_make(b->vfs, b->row_store, &params, b->params.memory_bytes, b->journal,
                             b->pool, b->job, err);
    return rc < 0 ? -1 : state_done(b, "graph.done", err);
}

static int stage_graph(struct build *b, struct error *err)
{
    static const char *const used_up[] = {"draft", "edges", "edges.table"};
    uint64_t linked;

    if (!state_has(b, "graph.done") && graph_make(b, err) < 0)
        return -1;
    for (size_t i = 0; i < sizeof used_up / sizeof used_up[0]; i++)
        if (scratch_remove(b, used_up[i], err) < 0)
            return -1;
    if (graph_store_open(b->vfs, b->journal, "graph", b->count, b->params.max_degree, false,
                         &b->graph, err) < 0)
        return -1;
    return graph_store_connect(b->graph, b->row_store, b->journal, b->pool, b->job, &linked, err);
}

/* ---- order ---- */

/* Rows that recall is calibrated with: one of each of equal stretches of the space order. They take
 * no part in the page order, see calibrate.h; there are none when the user brought queries, or
 * where there are too few rows to spare. */
static int choose_apart(struct build *b, struct error *err)
{
    uint32_t wanted = b->count / QUERY_SHARE < QUERIES_MAX ? b->count / QUERY_SHARE : QUERIES_MAX;
    uint32_t capacity = b->format.capacity;
    struct random random;

    if (b->params.calibrate_count || wanted < QUERIES_MIN)
        return 0;
    wanted += (b->count - wanted) % capacity; /* the rest fills whole pages */
    b->apart = malloc(wanted * sizeof *b->apart);
    if (!b->apart)
        return error_set(err, ERR_NOMEM, "no memory for %u rows to calibrate with", wanted);
    random_init(&random, b->params.seed, 2);
    for (uint32_t i = 0; i < wanted; i++) {
        uint64_t begin = (uint64_t)i * b->count / wanted;
        uint64_t end = (uint64_t)(i + 1) * b->count / wanted;

        b->apart[i] = (uint32_t)(begin + random_below(&random, end - begin));
    }
    b->layout.apart = b->apart;
    b->layout.apart_count = wanted;
    return 0;
}

static void tier_add(struct build *b, uint64_t rows)
{
    struct page_layout_params *layout = &b->layout;
    uint32_t last = layout->tier_count ? layout->tier_ends[layout->tier_count - 1] : 0;

    rows -= rows % layout->capacity;
    if (rows < last + TIER_ROWS_MIN || rows + layout->apart_count + TIER_ROWS_MIN > b->count)
        return;
    layout->tier_ends[layout->tier_count++] = (uint32_t)rows;
}

/* With a memory to serve from, the one tier that fits it; else tiers for any. A tier costs the rows
 * behind it some of their neighbours on the page, so a tier that no budget will hold is a loss. */
static void choose_tiers(struct build *b)
{
    static const uint32_t percents[] = {5, 10, 20, 40};
    uint32_t capacity = b->format.capacity;

    if (b->params.serve_memory_bytes) {
        uint64_t fixed = (uint64_t)b->count * quantiser_code_bytes(b->quantiser) +
                         quantiser_memory_bytes(b->quantiser) + sizeof(struct disk_index) +
                         sizeof(struct walk_calibration) +
                         cells_memory_plan(b->count, b->cell_pages * capacity, b->dim);

        if (b->params.serve_memory_bytes > fixed)
            tier_add(b, (b->params.serve_memory_bytes - fixed) / b->format.page_bytes * capacity);
        return;
    }
    for (uint32_t i = 0; i < sizeof percents / sizeof percents[0]; i++)
        tier_add(b, (uint64_t)b->count * percents[i] / 100);
}

static int read_lists(void *context, uint32_t first, uint32_t count, uint32_t *lists,
                      struct error *err)
{
    const struct graph_store *store = context;
    uint32_t words = graph_record_words(LEAF_GRAPH_LIST_PLACES);
    uint32_t records[LIST_ROWS * (LEAF_GRAPH_LIST_PLACES + 2)];

    for (uint32_t done = 0; done < count; done += LIST_ROWS) {
        uint32_t rows = count - done < LIST_ROWS ? count - done : LIST_ROWS;

        if (graph_store_read(store, first + done, rows, records, err) < 0)
            return -1;
        for (uint32_t i = 0; i < rows; i++) {
            const uint32_t *record = records + i * words;
            uint32_t *list = lists + (uint64_t)(done + i) * LEAF_GRAPH_LIST_PLACES;

            for (uint32_t k = 0; k < LEAF_GRAPH_LIST_PLACES; k++)
                list[k] = k < record[0] ? record[1 + k] : NEIGHBOUR_NONE;
        }
    }
    return 0;
}

static int read_vectors(void *context, uint32_t first, uint32_t count, uint8_t *rows,
                        struct error *err)
{
    const struct build *b = context;

    return row_store_read(b->row_store, first, count, rows, err);
}

static int order_make(struct build *b, struct error *err)
{
    struct graph_store *lists = NULL;
    const struct page_vectors vectors = {.count = b->count,
                                         .dim = b->shape.space_dim,
                                         .type = b->shape.space_type,
                                         .row_bytes = b->shape.stride,
                                         .read = read_vectors,
                                         .context = b};
    int rc = -1;

    b->order = malloc((uint64_t)b->count * sizeof *b->order);
    if (!b->order)
        return error_set(err, ERR_NOMEM, "no memory for the order of %u rows", b->count);
    if (graph_store_open(b->vfs, b->journal, "lists", b->count, LEAF_GRAPH_LIST_PLACES, false,
                         &lists, err) < 0)
        return -1;
    const struct page_neighbours neighbours = {LEAF_GRAPH_LIST_PLACES, read_lists, lists};

    if (page_layout_make(&vectors, &neighbours, &b->layout, b->pool, b->job, b->order, err) == 0 &&
        scratch_write(b, "order", b->order, (uint64_t)b->count * sizeof *b->order, err) == 0)
        rc = state_done(b, "order.done", err);
    graph_store_close(lists);
    return rc;
}

static int order_read(struct build *b, struct error *err)
{
    uint64_t bytes;
    uint8_t *order;

    if (scratch_read(b, "order", (uint64_t)b->count * sizeof *b->order, &order, &bytes, err) < 0)
        return -1;
    b->order = (uint32_t *)(void *)order;
    for (uint32_t i = 0; i < b->count; i++)
        if (b->order[i] >= b->count)
            return error_set(err, ERR_CORRUPT, "scratch/order: position %" PRIu32 " is of no row",
                             i);
    return 0;
}

static int stage_order(struct build *b, struct error *err)
{
    char path[FILE_PATH_MAX], folder[FILE_PATH_MAX];

    b->cell_pages = (CELL_ROWS + b->format.capacity / 2) / b->format.capacity;
    if (b->cell_pages < 1)
        b->cell_pages = 1;
    b->layout.capacity = b->format.capacity;
    b->layout.seed = b->params.seed;
    b->layout.refine_rounds = REFINE_ROUNDS;
    b->layout.window_rows = b->window_rows;
    if (choose_apart(b, err) < 0)
        return -1;
    choose_tiers(b);
    row_store_drop(b->row_store);
    malloc_trim(0); /* see stage_calibrate */
    if ((state_has(b, "order.done") ? order_read(b, err) : order_make(b, err)) < 0)
        return -1;
    if (scratch_remove(b, "lists", err) < 0 ||
        journal_scratch_path(b->journal, "numbers", path, err) < 0)
        return -1;
    file_path_folder(folder, path);
    if (row_store_read_numbers(b->vfs, folder, b->count, &b->numbers, err) < 0)
        return -1;
    b->positions = malloc((uint64_t)b->count * sizeof *b->positions);
    if (!b->positions)
        return error_set(err, ERR_NOMEM, "no memory for the positions of %u rows", b->count);
    for (uint32_t position = 0; position < b->count; position++)
        b->positions[b->order[position]] = position;
    return 0;
}

/* ---- what the segment says of itself ---- */

static int segment_id_make(const struct build *b, uint8_t id[DIGEST_BYTES], struct error *err)
{
    const struct segment_build_params *p = &b->params;
    char text[512];
    struct digest *digest = digest_new();

    if (!digest)
        return error_set(err, ERR_NOMEM, "no memory for the segment's id");
    snprintf(text, sizeof text,
             "annd segment %u shard 0 rows %u dim %u element %u metric %u store %u code %u/%u/%u "
             "degree %u list %u alpha %a seed %" PRIu64 " originals %d serve %" PRIu64
             " queries %u builder %u window %u",
             FORMAT_VERSION, b->count, b->dim, (unsigned)b->shape.element, (unsigned)p->metric,
             (unsigned)b->store, (unsigned)p->code, p->code_bytes, (unsigned)p->own_distortion,
             p->max_degree, p->build_list, (double)p->alpha, p->seed, p->keep_originals,
             p->serve_memory_bytes, p->calibrate_count, (unsigned)p->builder, b->window_rows);
    digest_update(digest, text, strlen(text));
    if (p->calibrate_count)
        digest_update(digest, p->calibrate_vectors,
                      (uint64_t)p->calibrate_count * b->dim * sizeof *p->calibrate_vectors);
    digest_update(digest, b->input_digest, DIGEST_BYTES);
    digest_update(digest, b->rows->digest, DIGEST_BYTES);
    digest_finish(digest, id);
    return 0;
}

/* What the choice of the code rests on, a sentence a trial, kept in the state until there is a
 * manifest for it. */
static int trials_keep(struct build *b, const struct code_bake_off *bake_off, struct error *err)
{
    for (uint32_t i = 0; i < bake_off->count; i++) {
        const struct code_trial *t = &bake_off->trials[i];
        char name[32], text[256];

        snprintf(name, sizeof name, "trial.%u", i);
        if (t->verified_95 > 0)
            snprintf(text, sizeof text,
                     "%s of %u bytes%s: distortion %.4g; of %u rows, %.1f and %.1f looked at give "
                     "0.95 and 0.99 of the ten nearest (%u queries)%s",
                     code_kind_name(t->kind), t->code_bytes,
                     t->own_distortion ? " with its own distortion" : "", (double)t->distortion,
                     bake_off->base_rows, (double)t->verified_95, (double)t->verified_99,
                     bake_off->queries, t->chosen ? "; chosen" : "");
        else
            snprintf(text, sizeof text, "%s of %u bytes%s: distortion %.4g; as asked for",
                     code_kind_name(t->kind), t->code_bytes,
                     t->own_distortion ? " with its own distortion" : "", (double)t->distortion);
        if (manifest_set_text(journal_state(b->journal), name, text, err) < 0)
            return -1;
    }
    return 0;
}

static int trials_fill(struct build *b, struct manifest *m, struct error *err)
{
    for (uint32_t i = 0;; i++) {
        char name[32], entry[32];
        const char *text;

        snprintf(entry, sizeof entry, "trial.%u", i);
        snprintf(name, sizeof name, "field.0.trial.%u", i);
        if (!state_has(b, entry))
            return 0;
        if (manifest_get_text(journal_state(b->journal), entry, &text, err) < 0 ||
            manifest_set_text(m, name, text, err) < 0)
            return -1;
    }
}

static int manifest_fill(struct build *b, struct error *err)
{
    struct manifest *m = segment_writer_manifest(b->writer);
    const struct {
        const char *name;
        uint64_t value;
    } numbers[] = {
        {"field.0.dim", b->dim},
        {"field.0.element", b->shape.element},
        {"field.0.metric", b->params.metric},
        {"field.0.store", b->store},
        {"field.0.code_kind", quantiser_kind(b->quantiser)},
        {"field.0.code_bytes", quantiser_code_bytes(b->quantiser)},
        {"field.0.page_bytes", b->format.page_bytes},
        {"field.0.page_capacity", b->format.capacity},
        {"field.0.max_degree", b->graph->max_degree},
        {"field.0.build_list", b->params.build_list},
        {"field.0.entry_point", b->positions[b->graph->entry_point]},
        {"field.0.page_holds_keys", b->format.holds_keys},
        {"field.0.page_holds_rows", b->format.holds_rows},
        {"field.0.normalised", b->normalised},
        {"field.0.exact_pages", b->exact_pages},
        {"field.0.zero_vectors", b->result->zero_vectors},
        {"field.0.seed", b->params.seed},
        {"field.0.cell_pages", b->cell_pages},
        {"field.0.own_distortion", quantiser_has_own_distortion(b->quantiser)},
        {"field.0.left_out_rows", b->layout.apart_count},
        {"field.count", 1},
        {"shard", 0},
        {"lsn.min", 0},
        {"lsn.max", 0},
    };

    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if (manifest_set_u64(m, numbers[i].name, numbers[i].value, err) < 0)
            return -1;
    if (manifest_set_f64(m, "field.0.alpha", (double)b->params.alpha, err) < 0 ||
        manifest_set_f64(m, "field.0.distortion", (double)quantiser_distortion(b->quantiser), err) <
            0 ||
        manifest_set_bytes(m, "input.sha256", b->input_digest, DIGEST_BYTES, err) < 0 ||
        manifest_set_bytes(m, "rows.sha256", b->rows->digest, DIGEST_BYTES, err) < 0)
        return -1;
    for (uint32_t i = 0; i < b->layout.tier_count; i++) {
        char name[32];

        snprintf(name, sizeof name, "field.0.tier.%u", i);
        if (manifest_set_u64(m, name, b->layout.tier_ends[i], err) < 0)
            return -1;
    }
    return trials_fill(b, m, err);
}

/* ---- calibration ---- */

static int write_calibration(struct build *b, const struct walk_calibration *calibration,
                             struct error *err)
{
    uint8_t *bytes = NULL;
    size_t count;
    int rc = -1;

    if (walk_calibration_encode(calibration, &bytes, &count, err) < 0)
        return -1;
    if (segment_writer_begin(b->writer, "f0.calibration", SECTION_STATS, FILE_BLOCK_BYTES, err) ==
            0 &&
        segment_writer_append(b->writer, bytes, count, err) == 0)
        rc = segment_writer_end(b->writer, err);
    free(bytes);
    return rc;
}

/* Truth by row numbers to truth by positions, a query's own row left out. places: of rows. */
static void truth_positions(const struct build *b, const struct truth *truth,
                            const uint32_t *places, uint32_t truth_k, uint32_t *out)
{
    for (uint32_t q = 0; q < truth->query_count; q++) {
        const uint32_t *ids = truth->ids + (uint64_t)q * truth->k;
        uint32_t kept = 0;

        for (uint32_t i = 0; i < truth->k && kept < truth_k; i++)
            if (!b->apart || places[ids[i]] != b->apart[q])
                out[(uint64_t)q * truth_k + kept++] = b->positions[places[ids[i]]];
    }
}

/* The queries, and their true neighbours as positions. */
static int calibrate_truth(struct build *b, float *vectors, uint32_t count, uint32_t truth_k,
                           uint32_t *hidden, uint32_t *positions, struct error *err)
{
    struct truth truth = {0};
    uint8_t *raw = malloc(b->shape.raw_bytes);
    uint32_t *places = NULL;
    int rc = -1;

    if (!raw) {
        error_set(err, ERR_NOMEM, "no memory for a row");
        goto done;
    }
    for (uint32_t i = 0; i < count && b->apart; i++) {
        if (row_store_read_raw(b->row_store, b->apart[i], 1, raw, err) < 0)
            goto done;
        raw_to_floats(raw, b->shape.element, b->dim, vectors + (uint64_t)i * b->dim);
        hidden[i] = b->positions[b->apart[i]];
    }
    if (!b->apart)
        memcpy(vectors, b->params.calibrate_vectors, (uint64_t)count * b->dim * sizeof *vectors);
    if (flat_truth(b->source, vectors, count, b->apart ? truth_k + 1 : truth_k, b->params.metric,
                   b->pool, b->job, &truth, err) < 0)
        goto done;
    places = malloc((uint64_t)b->count * sizeof *places);
    if (!places) {
        error_set(err, ERR_NOMEM, "no memory for the places of %u rows", b->count);
        goto done;
    }
    for (uint32_t place = 0; place < b->count; place++)
        places[b->numbers[place]] = place;
    truth_positions(b, &truth, places, truth_k, positions);
    rc = 0;
done:
    free(places);
    free(raw);
    truth_release(&truth);
    return rc;
}

/* Measures on the files as they are to be published. Nothing of the order is needed any more once
 * the truth is known: codes and pages take its memory. */
static int stage_calibrate(struct build *b, struct error *err)
{
    uint32_t count = b->apart ? b->layout.apart_count : b->params.calibrate_count;
    uint32_t truth_k = b->count - 1 < TRUTH_K ? b->count - 1 : TRUTH_K;
    struct walk_calibration *calibration = NULL;
    struct segment *segment = NULL;
    float *vectors = NULL;
    uint32_t *positions = NULL, *hidden = NULL;
    uint64_t memory = b->params.memory_bytes;
    int rc = -1;

    if (!count || segment_writer_has(b->writer, "f0.calibration"))
        return 0;
    calibration = calloc(1, sizeof *calibration);
    positions = malloc((uint64_t)count * truth_k * sizeof *positions);
    hidden = malloc(count * sizeof *hidden);
    vectors = malloc((uint64_t)count * b->dim * sizeof *vectors);
    if (!calibration || !positions || !hidden || !vectors) {
        error_set(err, ERR_NOMEM, "no memory for the calibration");
        goto done;
    }
    if (calibrate_truth(b, vectors, count, truth_k, hidden, positions, err) < 0)
        goto done;
    free(b->order);
    free(b->positions);
    free(b->numbers);
    b->order = b->positions = b->numbers = NULL;
    /* What is freed in small pieces by many threads stays in their heaps: the plan counts on having
     * it back. */
    malloc_trim(0);
    const struct calibrate_queries queries = {vectors, count, b->apart ? hidden : NULL, positions,
                                              truth_k};

    if (memory) {
        uint64_t others = build_plan_process_bytes(b->pool ? pool_workers(b->pool) : 1);

        memory = memory > others ? memory - others : 1;
    }
    if (segment_writer_preview(b->writer, err) < 0 ||
        segment_open(b->vfs, segment_writer_folder(b->writer), &segment, err) < 0 ||
        calibrate_field(segment, 0, &queries, b->params.serve_memory_bytes, memory, b->pool, b->job,
                        calibration, err) < 0)
        goto done;
    rc = write_calibration(b, calibration, err);
done:
    segment_close(segment);
    free(calibration);
    free(positions);
    free(hidden);
    free(vectors);
    return rc;
}

/* ---- the whole ---- */

/* Seconds on four cores of 2.5 GHz, for the forecast of what is left: `fixed`, and so much a
 * million rows, and a million rows of 128 bytes. Only their ratios matter. */
static const struct {
    const char *name;
    float fixed, rows, bytes;
} phase_costs[] = {
    {"inspect", 0, 0, 0.3f},   {"train", 0.1f, 0, 0},      {"train codes", 3.5f, 0, 0},
    {"sample", 0, 0, 0.1f},    {"page order", 0, 0, 0.3f}, {"assign", 0, 0.5f, 0.6f},
    {"place", 0, 0, 0.3f},     {"candidates", 0, 15, 15},  {"edges", 0, 6, 6},
    {"connect", 0, 0.3f, 0},   {"page order", 0, 3, 2},    {"codes", 0, 0.5f, 1},
    {"pages", 0, 2, 1},        {"originals", 0, 0, 1},     {"rows", 0, 5, 0},
    {"keys", 0, 0.2f, 0},      {"scan", 0, 0, 1.5f},       {"rank", 0.1f, 0, 0},
    {"calibrate", 5, 0.5f, 0}, {"publish", 0.2f, 0, 0},
};

#define PHASES (sizeof phase_costs / sizeof phase_costs[0])

static void job_plan_make(const struct build *b)
{
    double rows = b->count / 1e6, bytes = rows * (double)b->shape.raw_bytes / 128;
    struct job_plan_phase plan[PHASES];
    uint32_t count = 0;

    for (size_t i = 0; i < PHASES; i++) {
        const char *name = phase_costs[i].name;

        if ((!strcmp(name, "originals") && (!b->params.keep_originals || b->exact_pages)) ||
            (!strcmp(name, "rows") && !b->rows->record))
            continue;
        plan[count++] = (struct job_plan_phase){name, (double)phase_costs[i].fixed +
                                                          (double)phase_costs[i].rows * rows +
                                                          (double)phase_costs[i].bytes * bytes};
    }
    job_plan(b->job, plan, count);
}

/* What the manifest tells of a segment that is about to be published, or was by an earlier run. */
static int result_fill(struct build *b, const struct manifest *m, struct error *err)
{
    struct segment_build_result *r = b->result;
    uint64_t edges, kind, code_bytes, page_bytes, capacity;
    double distortion;

    if (manifest_get_u64(m, "field.0.edges", &r->edges_kept, err) < 0 ||
        manifest_get_u64(m, "field.0.edges_given", &r->edges_given, err) < 0 ||
        manifest_get_u64(m, "field.0.edges_of_graph", &edges, err) < 0 ||
        manifest_get_u64(m, "field.0.code_kind", &kind, err) < 0 ||
        manifest_get_u64(m, "field.0.code_bytes", &code_bytes, err) < 0 ||
        manifest_get_u64(m, "field.0.page_bytes", &page_bytes, err) < 0 ||
        manifest_get_u64(m, "field.0.page_capacity", &capacity, err) < 0 ||
        manifest_get_f64(m, "field.0.distortion", &distortion, err) < 0)
        return -1;
    r->row_count = b->count;
    r->code = (enum code_kind)kind;
    r->code_bytes = (uint32_t)code_bytes;
    r->store = b->store;
    r->page_bytes = (uint32_t)page_bytes;
    r->page_capacity = (uint32_t)capacity;
    r->distortion = (float)distortion;
    r->mean_degree = (double)edges / b->count;
    return 0;
}

static int result_read(struct build *b, const char *path, struct error *err)
{
    struct segment *segment = NULL;
    int rc;

    if (segment_open(b->vfs, path, &segment, err) < 0)
        return -1;
    rc = result_fill(b, segment_manifest(segment), err);
    segment_close(segment);
    return rc;
}

/* What of the grant is the partition's; it takes no more than it can use. */
static uint64_t partition_memory(const struct build *b)
{
    uint32_t workers = b->pool ? pool_workers(b->pool) : 1;
    uint64_t full = partition_memory_full(&b->shape, b->count, workers);
    uint64_t others = build_plan_process_bytes(workers);

    if (!b->params.memory_bytes || b->params.memory_bytes >= full + others)
        return full;
    return b->params.memory_bytes - others;
}

static int build_segment(struct build *b, const char *path, const uint8_t id[DIGEST_BYTES],
                         struct error *err)
{
    char scratch[FILE_PATH_MAX], folder[FILE_PATH_MAX];

    if (stage_train(b, err) < 0 || journal_scratch_path(b->journal, "rows", scratch, err) < 0)
        return -1;
    file_path_folder(folder, scratch);
    if (partition_make(b->vfs, b->source, &b->shape, b->params.seed, partition_memory(b),
                       b->journal, b->pool, b->job, err) < 0)
        return -1;
    if (row_store_open(b->vfs, folder, &b->shape, b->count, &b->row_store, err) < 0 ||
        stage_graph(b, err) < 0)
        return -1;
    if (stage_order(b, err) < 0 || state_done(b, "segment.begun", err) < 0 ||
        segment_writer_resume(b->vfs, path, id, b->count, &b->writer, err) < 0 ||
        segment_parts_write(b, err) < 0 || manifest_fill(b, err) < 0 ||
        stage_calibrate(b, err) < 0 || result_fill(b, segment_writer_manifest(b->writer), err) < 0)
        return -1;
    job_phase(b->job, "publish", 0);
    return segment_writer_publish(b->writer, err);
}

static int build_all(struct build *b, const char *folder, struct error *err)
{
    uint8_t id[DIGEST_BYTES];
    char hex[2 * DIGEST_BYTES + 1], path[FILE_PATH_MAX];

    if (plan_decide(b, err) < 0 || stage_inspect(b, err) < 0 ||
        page_format_choose(&b->format, b->store, b->params.metric, b->dim, b->params.max_degree,
                           b->count, !b->rows->text_keys, false, err) < 0 ||
        segment_id_make(b, id, err) < 0)
        return -1;
    digest_hex(id, DIGEST_BYTES, hex);
    snprintf(b->result->name, sizeof b->result->name, "seg-%.16s", hex);
    if (file_path_join(path, folder, b->result->name, err) < 0)
        return -1;
    if (!file_exists(b->vfs, path))
        return build_segment(b, path, id, err);
    /* By an earlier run of this journal, or by somebody else. */
    if (!state_has(b, "segment.begun"))
        return error_set(err, ERR_EXISTS, "%s is there already", path);
    return result_read(b, path, err);
}

static int own_journal(struct vfs *vfs, const char *folder, struct journal **out, char *path,
                       struct error *err)
{
    struct manifest *asked = manifest_new(MANIFEST_JOB);
    int rc;

    if (!asked)
        return error_set(err, ERR_NOMEM, "no memory for a journal");
    rc = file_path_join(path, folder, "build", err);
    if (rc == 0)
        rc = file_remove_all(vfs, path, err);
    if (rc == 0)
        rc = journal_create(vfs, path, asked, out, err);
    manifest_free(asked);
    return rc;
}

int segment_build(struct vfs *vfs, const char *folder, const struct vector_source *source,
                  const struct segment_build_rows *rows, const struct segment_build_params *params,
                  struct journal *journal, struct pool *pool, struct job *job,
                  struct segment_build_result *result, struct error *err)
{
    struct build b = {.vfs = vfs,
                      .source = source,
                      .rows = rows,
                      .params = *params,
                      .journal = journal,
                      .pool = pool,
                      .job = job,
                      .result = result};
    char own_path[FILE_PATH_MAX];
    int rc = -1;

    memset(result, 0, sizeof *result);
    if (segment_build_params_check(source, &b.params, err) < 0)
        return -1;
    if (!journal && own_journal(vfs, folder, &b.journal, own_path, err) < 0)
        return -1;
    b.count = (uint32_t)vector_source_rows(source);
    b.dim = vector_source_dim(source);
    b.store = (enum vector_store)b.params.store;
    row_shape_init(&b.shape, b.params.metric, vector_source_type(source), b.dim);
    b.normalised = b.params.metric == METRIC_COSINE && is_float(b.shape.element);
    b.exact_pages = !is_float(b.shape.element) || (b.store == STORE_F32 && !b.normalised);
    job_plan_make(&b);
    if (build_all(&b, folder, err) < 0)
        goto done;
    job_finish(job);
    rc = 0;
done:
    segment_writer_close(b.writer); /* keeps what a later run can go on with */
    quantiser_free(b.quantiser);
    graph_store_close(b.graph);
    row_store_close(b.row_store);
    free(b.apart);
    free(b.order);
    free(b.positions);
    free(b.numbers);
    if (!journal) {
        char aside[FILE_PATH_MAX];

        journal_close(b.journal);
        file_remove_all(vfs, own_path, NULL);
        if (rc < 0 && result->name[0] && file_path_join(aside, folder, result->name, NULL) == 0) {
            strcat(aside, ".tmp");
            file_remove_all(vfs, aside, NULL);
        }
    }
    return rc;
}
