/* How graph_store_connect works: places are expanded in the order of the file, again and again,
 * until a pass brings nothing new: rows are in space order, so that most of a graph is reached in
 * the first pass. Each reached place remembers where it was reached from; these tree edges alone
 * keep everything reached, so any other edge may be overwritten. What no edge leads to is then
 * linked, in order of place, from the nearest reached row among its own neighbours that has room or
 * an edge to spare; when there is none, from any reached row of its leaf, or else of all. Changed
 * records are kept in memory until they are all known, written to "patches", committed, and only
 * then written into the graph: to do that again does no harm. */
#include "index/graph_store.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/distance.h"
#include "index/vamana_search.h"
#include "storage/base/bytes.h"
#include "storage/file.h"

#ifndef READ_PLACES /* tests make it small */
#define READ_PLACES 8192u
#endif
#define NOWHERE UINT32_MAX
#define ENTRY_LEAVES 8u

/* ---- the file ---- */

static uint64_t record_bytes(const struct graph_store *graph)
{
    return graph_record_words(graph->max_degree) * sizeof(uint32_t);
}

int graph_store_open(struct vfs *vfs, struct journal *journal, const char *name, uint32_t count,
                     uint32_t max_degree, bool fresh, struct graph_store **out, struct error *err)
{
    struct graph_store *graph = calloc(1, sizeof *graph);
    char path[FILE_PATH_MAX];

    if (!graph || journal_scratch_path(journal, name, path, err) < 0) {
        free(graph);
        return graph ? -1 : error_set(err, ERR_NOMEM, "no memory for a graph's file");
    }
    graph->count = count;
    graph->max_degree = max_degree;
    graph->path = strdup(path);
    if (!graph->path) {
        error_set(err, ERR_NOMEM, "no memory for a path");
        goto failed;
    }
    if (fresh && file_remove_all(vfs, path, err) < 0)
        goto failed;
    graph->file = file_open(vfs, path, fresh ? VFS_WRITE | VFS_CREATE : VFS_WRITE, err);
    if (!graph->file)
        goto failed;
    *out = graph;
    return 0;
failed:
    graph_store_close(graph);
    return -1;
}

void graph_store_close(struct graph_store *graph)
{
    if (!graph)
        return;
    file_close(graph->file, graph->path, NULL);
    free(graph->path);
    free(graph);
}

static uint32_t checksum_of(const struct graph_store *graph, uint32_t place, const uint32_t *record)
{
    return crc32c(place, record, (graph->max_degree + 1ull) * sizeof *record);
}

static bool is_sound(const struct graph_store *graph, uint32_t place, const uint32_t *record)
{
    bool sound = record[0] <= graph->max_degree &&
                 record[graph->max_degree + 1] == checksum_of(graph, place, record);

    for (uint32_t e = 0; sound && e < record[0]; e++)
        sound = record[1 + e] < graph->count;
    return sound;
}

int graph_store_read(const struct graph_store *graph, uint32_t first, uint32_t count,
                     uint32_t *records, struct error *err)
{
    if (file_read_exact(graph->file, graph->path, records, count * record_bytes(graph),
                        first * record_bytes(graph), err) < 0)
        return -1;
    for (uint32_t i = 0; i < count; i++) {
        if (!is_sound(graph, first + i,
                      records + (uint64_t)i * graph_record_words(graph->max_degree)))
            return error_set(err, ERR_CORRUPT, "%s: the record of row %" PRIu32 " is damaged",
                             graph->path, first + i);
    }
    return 0;
}

int graph_store_write(struct graph_store *graph, uint32_t first, uint32_t count, uint32_t *records,
                      struct error *err)
{
    for (uint32_t i = 0; i < count; i++) {
        uint32_t *record = records + (uint64_t)i * graph_record_words(graph->max_degree);

        record[graph->max_degree + 1] = checksum_of(graph, first + i, record);
    }
    return file_write_full(graph->file, graph->path, records, count * record_bytes(graph),
                           first * record_bytes(graph), err);
}

int graph_store_sync(struct graph_store *graph, struct error *err)
{
    return file_sync(graph->file, graph->path, err);
}

int graph_store_fill(struct graph_store *store, const struct graph *graph, struct error *err)
{
    uint32_t stride = graph_record_words(store->max_degree);
    uint32_t *records = calloc((uint64_t)READ_PLACES * stride, sizeof *records);
    int rc = -1;

    assert(graph->count == store->count && graph->max_degree <= store->max_degree);
    if (!records)
        return error_set(err, ERR_NOMEM, "no memory to write a graph");
    for (uint64_t first = 0; first < graph->count; first += READ_PLACES) {
        uint32_t rows =
            (uint32_t)(graph->count - first < READ_PLACES ? graph->count - first : READ_PLACES);

        memset(records, 0, (uint64_t)rows * stride * sizeof *records);
        for (uint32_t i = 0; i < rows; i++) {
            uint32_t *record = records + (uint64_t)i * stride;

            record[0] = graph->degrees[first + i];
            memcpy(record + 1, graph->neighbours + (first + i) * graph->max_degree,
                   record[0] * sizeof *record);
        }
        if (graph_store_write(store, (uint32_t)first, rows, records, err) < 0)
            goto done;
    }
    store->entry_point = graph->entry_point;
    rc = 0;
done:
    free(records);
    return rc;
}

/* ---- connectivity ---- */

struct patch {
    uint32_t place;
    uint32_t next; /* in its chain, NOWHERE at the end */
};

enum place_state {
    PLACE_OPEN,     /* not expanded yet */
    PLACE_EXPANDED, /* all its neighbours are reached */
    PLACE_FULL      /* expanded, and of tree edges alone: that is so for ever */
};

struct repair {
    struct graph_store *graph;
    const struct row_store *store;
    struct job *job;
    uint32_t *from;      /* where each place was reached from */
    uint8_t *states;     /* a byte a place: enum place_state */
    uint32_t *records;   /* READ_PLACES of them, a block of the file */
    uint32_t *one;       /* one record */
    uint32_t leaf;       /* that leaf_spare is about */
    uint32_t leaf_spare; /* no reached place of the leaf before it has an edge to spare */
    uint32_t spare;      /* the same of all places */
    uint64_t linked;

    /* records changed so far: a table of chains by place */
    struct patch *patches;
    uint32_t *patched; /* their records */
    uint32_t patch_count;
    uint32_t patch_room;
    uint32_t *chains; /* CHAINS */
};

#define CHAINS 65536u

static uint32_t *find_patch(const struct repair *r, uint32_t place)
{
    for (uint32_t i = r->chains[place % CHAINS]; i != NOWHERE; i = r->patches[i].next)
        if (r->patches[i].place == place)
            return r->patched + (uint64_t)i * graph_record_words(r->graph->max_degree);
    return NULL;
}

/* The record as it will be: in `one` unless it is patched already. */
static int read_one(const struct repair *r, uint32_t place, const uint32_t **out, struct error *err)
{
    const uint32_t *record = find_patch(r, place);

    if (!record) {
        if (graph_store_read(r->graph, place, 1, r->one, err) < 0)
            return -1;
        record = r->one;
    }
    *out = record;
    return 0;
}

static int patch_of(struct repair *r, uint32_t place, uint32_t **out, struct error *err)
{
    uint32_t stride = graph_record_words(r->graph->max_degree);

    *out = find_patch(r, place);
    if (*out)
        return 0;
    if (r->patch_count == r->patch_room) {
        uint32_t room = r->patch_room ? 2 * r->patch_room : 1024;
        struct patch *patches = realloc(r->patches, room * sizeof *patches);
        uint32_t *patched;

        if (patches)
            r->patches = patches;
        patched = patches ? realloc(r->patched, (uint64_t)room * stride * sizeof *patched) : NULL;
        if (!patched)
            return error_set(err, ERR_NOMEM, "graph repair: no memory for %" PRIu32 " rows", room);
        r->patched = patched;
        r->patch_room = room;
    }
    *out = r->patched + (uint64_t)r->patch_count * stride;
    if (graph_store_read(r->graph, place, 1, *out, err) < 0)
        return -1;
    r->patches[r->patch_count] = (struct patch){place, r->chains[place % CHAINS]};
    r->chains[place % CHAINS] = r->patch_count++;
    return 0;
}

/* Expands the reached places of the block that was read, in order. Returns whether that reached
 * one of them that the order had passed by; *before: one before the block. */
static bool expand_block(struct repair *r, uint32_t first, uint32_t rows, bool *before)
{
    uint32_t stride = graph_record_words(r->graph->max_degree);
    bool again = false;

    for (uint32_t i = 0; i < rows; i++) {
        const uint32_t *record = r->records + (uint64_t)i * stride;
        uint32_t place = first + i;

        if (r->from[place] == NOWHERE || r->states[place] != PLACE_OPEN)
            continue;
        r->states[place] = PLACE_EXPANDED;
        job_advance(r->job, 1, NULL);
        for (uint32_t e = 0; e < record[0]; e++) {
            uint32_t to = record[1 + e];

            if (r->from[to] != NOWHERE)
                continue;
            r->from[to] = place;
            *before = *before || to < first;
            again = again || (to >= first && to < place);
        }
    }
    return again;
}

/* Expands every reached place of the file, pass by pass, until one reaches nothing new. */
static int walk_all(struct repair *r, struct error *err)
{
    struct graph_store *graph = r->graph;
    bool again = true;

    while (again) {
        again = false;
        for (uint64_t first = 0; first < graph->count; first += READ_PLACES) {
            uint32_t rows =
                (uint32_t)(graph->count - first < READ_PLACES ? graph->count - first : READ_PLACES);
            bool wanted = false;

            for (uint32_t i = 0; i < rows && !wanted; i++)
                wanted = r->from[first + i] != NOWHERE && r->states[first + i] == PLACE_OPEN;
            if (!wanted)
                continue;
            if (graph_store_read(graph, (uint32_t)first, rows, r->records, err) < 0 ||
                job_advance(r->job, 0, err) < 0)
                return -1;
            while (expand_block(r, (uint32_t)first, rows, &again))
                ;
        }
    }
    return 0;
}

/* `place` is reached from `from` by an edge of the tree; it may have edges to spare. */
static void reach(struct repair *r, uint32_t place, uint32_t from)
{
    r->from[place] = from;
    r->spare = place < r->spare ? place : r->spare;
    r->leaf_spare = place < r->leaf_spare ? place : r->leaf_spare;
}

/* Marks what is reached through `place`, which just was: few rows, read one by one. */
static int walk_from(struct repair *r, uint32_t place, struct error *err)
{
    uint32_t *queue = NULL;
    uint32_t count = 0, head = 0, room = 0;
    int rc = -1;

    for (;;) {
        const uint32_t *record;

        if (read_one(r, place, &record, err) < 0)
            goto done;
        r->states[place] = PLACE_EXPANDED;
        if (job_advance(r->job, 1, err) < 0)
            goto done;
        for (uint32_t e = 0; e < record[0]; e++) {
            uint32_t to = record[1 + e];

            if (r->from[to] != NOWHERE)
                continue;
            reach(r, to, place);
            if (count == room) {
                uint32_t *grown = realloc(queue, (room = room ? 2 * room : 256) * sizeof *queue);

                if (!grown) {
                    error_set(err, ERR_NOMEM, "graph repair: no memory for a queue");
                    goto done;
                }
                queue = grown;
            }
            queue[count++] = to;
        }
        if (head == count)
            break;
        place = queue[head++];
    }
    rc = 0;
done:
    free(queue);
    return rc;
}

/* Adds node -> orphan: 1 if done, 0 if the node is full of tree edges. */
static int link_from(struct repair *r, uint32_t node, uint32_t orphan, struct error *err)
{
    uint32_t limit = r->graph->max_degree;
    const uint32_t *found;
    uint32_t *record;
    uint32_t at;

    if (r->states[node] == PLACE_FULL)
        return 0;
    if (read_one(r, node, &found, err) < 0)
        return -1;
    at = found[0];
    if (at == limit) {
        while (at > 0 && r->from[found[at]] == node)
            at--;
        if (at == 0) {
            r->states[node] = PLACE_FULL;
            return 0;
        }
        at--; /* the edge that makes room */
    }
    if (patch_of(r, node, &record, err) < 0)
        return -1;
    if (record[0] == limit)
        /* The link goes last: it is the repair's, not the prune's. */
        memmove(record + 1 + at, record + 2 + at, (limit - 1 - at) * sizeof *record);
    else
        record[0]++;
    record[record[0]] = orphan;
    reach(r, orphan, node);
    r->linked++;
    return 1;
}

static int link_orphan(struct repair *r, uint32_t orphan, struct error *err)
{
    const struct row_store *store = r->store;
    const uint32_t *record;
    uint32_t degree, low = 0, high = store->leaf_count;
    uint32_t *own;
    int rc = 0;

    if (read_one(r, orphan, &record, err) < 0)
        return -1;
    degree = record[0];
    own = malloc((degree + 1) * sizeof *own);
    if (!own)
        return error_set(err, ERR_NOMEM, "graph repair: no memory for a list");
    memcpy(own, record + 1, degree * sizeof *own);
    for (uint32_t e = 0; e < degree && rc == 0; e++)
        if (r->from[own[e]] != NOWHERE)
            rc = link_from(r, own[e], orphan, err);
    free(own);
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;

        if (store->leaf_begins[middle] <= orphan)
            low = middle;
        else
            high = middle;
    }
    /* Tree edges are never taken away: a row that once had nothing to spare never will. So each
     * search goes on where the one before ended, or where reach() put it back to. Leaves of the
     * tree have no tree edges: there always is one. */
    if (low != r->leaf || r->leaf_spare < store->leaf_begins[low]) {
        r->leaf = low;
        r->leaf_spare = store->leaf_begins[low];
    }
    while (rc == 0 && r->leaf_spare < store->leaf_begins[low + 1]) {
        if (r->from[r->leaf_spare] != NOWHERE)
            rc = link_from(r, r->leaf_spare, orphan, err);
        if (rc == 0)
            r->leaf_spare++;
    }
    while (rc == 0 && r->spare < r->graph->count) {
        if (r->from[r->spare] != NOWHERE)
            rc = link_from(r, r->spare, orphan, err);
        if (rc == 0)
            r->spare++;
    }
    if (rc == 0)
        return error_set(err, ERR_INTERNAL, "graph repair: no row has an edge to spare");
    return rc < 0 ? -1 : walk_from(r, orphan, err);
}

/* ---- the entry point ---- */

/* The row nearest to the mean of all, among those of the leaves nearest to it. */
static int choose_entry(struct graph_store *graph, const struct row_store *store, struct error *err)
{
    const struct row_shape *shape = &store->shape;
    uint32_t dim = shape->space_dim, nearest[ENTRY_LEAVES], taken = 0;
    float *mean = calloc(dim, sizeof *mean);
    uint8_t *row = file_buffer_alloc(shape->stride);
    struct vector_matrix matrix = {row, shape->stride, 1, dim, shape->space_type};
    struct row_space space;
    float best = INFINITY;
    int rc = -1;

    if (!mean || !row) {
        error_set(err, ERR_NOMEM, "no memory for the mean of the rows");
        goto done;
    }
    if (row_space_init(&space, &matrix, err) < 0)
        goto done;
    for (uint32_t leaf = 0; leaf < store->leaf_count; leaf++) {
        float weight =
            (float)(store->leaf_begins[leaf + 1] - store->leaf_begins[leaf]) / (float)store->count;

        for (uint32_t d = 0; d < dim; d++)
            mean[d] += weight * store->centroids[(uint64_t)leaf * dim + d];
    }
    for (; taken < ENTRY_LEAVES && taken < store->leaf_count; taken++) {
        float nearest_distance = INFINITY;

        nearest[taken] = NOWHERE;
        for (uint32_t leaf = 0; leaf < store->leaf_count; leaf++) {
            float d = space.kernels->l2_f32(mean, store->centroids + (uint64_t)leaf * dim, dim);
            bool used = store->leaf_begins[leaf] == store->leaf_begins[leaf + 1];

            for (uint32_t i = 0; i < taken && !used; i++)
                used = nearest[i] == leaf;
            if (!used && (d < nearest_distance || nearest[taken] == NOWHERE)) {
                nearest_distance = d;
                nearest[taken] = leaf;
            }
        }
        if (nearest[taken] == NOWHERE)
            break;
    }
    for (uint32_t i = 0; i < taken; i++) {
        for (uint32_t place = store->leaf_begins[nearest[i]];
             place < store->leaf_begins[nearest[i] + 1]; place++) {
            float d;

            if (row_store_read(store, place, 1, row, err) < 0)
                goto done;
            d = row_space_float_distance(&space, mean, row);
            if (d < best || (i == 0 && place == store->leaf_begins[nearest[0]])) {
                best = d;
                graph->entry_point = place;
            }
        }
    }
    rc = 0;
done:
    free(mean);
    free(row);
    return rc;
}

/* ---- resuming ---- */

static int write_patches(struct repair *r, struct vfs *vfs, const char *path, struct error *err)
{
    uint32_t stride = graph_record_words(r->graph->max_degree);
    struct vfs_file *file;
    int rc = -1;

    if (file_remove_all(vfs, path, err) < 0)
        return -1;
    file = file_open(vfs, path, VFS_WRITE | VFS_CREATE, err);
    if (!file)
        return -1;
    for (uint64_t i = 0; i < r->patch_count; i++) {
        uint64_t at = i * (stride + 1) * sizeof(uint32_t);
        uint32_t *record = r->patched + i * stride;

        record[stride - 1] = checksum_of(r->graph, r->patches[i].place, record);
        if (file_write_full(file, path, &r->patches[i].place, sizeof(uint32_t), at, err) < 0 ||
            file_write_full(file, path, record, stride * sizeof(uint32_t), at + sizeof(uint32_t),
                            err) < 0)
            goto done;
    }
    rc = file_sync(file, path, err);
done:
    file_close(file, path, NULL);
    return rc;
}

static int apply_patches(struct graph_store *graph, struct vfs *vfs, const char *path,
                         uint64_t count, struct error *err)
{
    uint32_t stride = graph_record_words(graph->max_degree);
    uint32_t *patch = malloc((stride + 1) * sizeof *patch);
    struct vfs_file *file = file_open(vfs, path, VFS_READ, err);
    int rc = -1;

    if (!patch)
        error_set(err, ERR_NOMEM, "no memory for a patch");
    if (!patch || !file)
        goto done;
    for (uint64_t i = 0; i < count; i++) {
        if (file_read_exact(file, path, patch, (stride + 1) * sizeof *patch,
                            i * (stride + 1) * sizeof *patch, err) < 0)
            goto done;
        if (patch[0] >= graph->count || !is_sound(graph, patch[0], patch + 1)) {
            error_set(err, ERR_CORRUPT, "%s: patch %" PRIu64 " is damaged", path, i);
            goto done;
        }
        if (graph_store_write(graph, patch[0], 1, patch + 1, err) < 0)
            goto done;
    }
    rc = graph_store_sync(graph, err);
done:
    file_close(file, path, NULL);
    free(patch);
    return rc;
}

static int find_patches(struct graph_store *graph, const struct row_store *store, struct vfs *vfs,
                        struct journal *journal, struct job *job, const char *path,
                        struct error *err)
{
    struct repair r = {.graph = graph, .store = store, .job = job};
    uint64_t stride = graph_record_words(graph->max_degree);
    int rc = -1;

    r.from = malloc((uint64_t)graph->count * sizeof *r.from);
    r.states = calloc(graph->count, 1);
    r.records = malloc(READ_PLACES * stride * sizeof *r.records);
    r.one = malloc(stride * sizeof *r.one);
    r.chains = malloc(CHAINS * sizeof *r.chains);
    if (!r.from || !r.states || !r.records || !r.one || !r.chains) {
        error_set(err, ERR_NOMEM, "graph repair: no memory for %" PRIu32 " rows", graph->count);
        goto done;
    }
    memset(r.from, 0xff, (uint64_t)graph->count * sizeof *r.from);
    memset(r.chains, 0xff, CHAINS * sizeof *r.chains);
    if (choose_entry(graph, store, err) < 0)
        goto done;
    r.from[graph->entry_point] = graph->entry_point;
    if (walk_all(&r, err) < 0)
        goto done;
    for (uint32_t place = 0; place < graph->count; place++)
        if (r.from[place] == NOWHERE && link_orphan(&r, place, err) < 0)
            goto done;
    if (write_patches(&r, vfs, path, err) < 0 ||
        manifest_set_u64(journal_state(journal), "connect.entry_point", graph->entry_point, err) <
            0 ||
        manifest_set_u64(journal_state(journal), "connect.linked", r.linked, err) < 0 ||
        manifest_set_u64(journal_state(journal), "connect.patches", r.patch_count, err) < 0)
        goto done;
    rc = journal_commit(journal, err);
done:
    free(r.from);
    free(r.states);
    free(r.records);
    free(r.one);
    free(r.chains);
    free(r.patches);
    free(r.patched);
    return rc;
}

int graph_store_connect(struct graph_store *graph, const struct row_store *store,
                        struct journal *journal, struct pool *pool, struct job *job,
                        uint64_t *linked, struct error *err)
{
    struct vfs *vfs = graph->file->vfs;
    struct manifest *state = journal_state(journal);
    char path[FILE_PATH_MAX];
    uint64_t entry, patches;

    (void)pool;
    job_phase(job, "connect", graph->count);
    if (journal_scratch_path(journal, "patches", path, err) < 0)
        return -1;
    if (!manifest_has(state, "connect.patches") &&
        find_patches(graph, store, vfs, journal, job, path, err) < 0)
        return -1;
    if (manifest_get_u64_in(state, "connect.entry_point", 0, graph->count - 1, &entry, err) < 0 ||
        manifest_get_u64(state, "connect.linked", linked, err) < 0 ||
        manifest_get_u64(state, "connect.patches", &patches, err) < 0)
        return -1;
    graph->entry_point = (uint32_t)entry;
    return patches ? apply_patches(graph, vfs, path, patches, err) : 0;
}
