/* How the walk works.
 *
 * The candidate list holds up to search_list positions, nearest first. A candidate enters with an
 * estimate from its code; when its page is read, the exact distance takes the estimate's place, and
 * so does that of every other node on the page. Then all loaded candidates still in the list are
 * expanded, best first: their neighbours are estimated and enter the list. Only when nothing loaded
 * is left to expand does the query ask for more pages, those of its best unread candidates, up to
 * beam_width in flight. So a page's buffer is free again as soon as the page has been worked off,
 * and a query needs beam_width buffers, however long it runs.
 *
 * Pages are worked off in the order they were asked for, whatever order they arrive in: the answer
 * is a function of the index and the query alone.
 *
 * What was seen is kept twice. The set of pages is exact: a neighbour on a page that was read or is
 * in flight is scored there and need not be estimated. The filter of estimated positions is a small
 * direct-mapped table that forgets; a position that is estimated again gets the same number and is
 * recognised in the list.
 *
 * Where it starts: positions stand in space order, so every n-th position is an even sample of the
 * data. The nearest of a sample, by code, and the entry point of the graph are the first
 * candidates. */
#include "index/disk_search.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "storage/base/bytes.h"
#include "storage/file.h"

#define START_SAMPLE 1024u
#define FILTER_BITS 14u
#define FILTER_SIZE (1u << FILTER_BITS)
#define FILTER_HASH 2654435761u

enum candidate_state {
    UNREAD = 0,
    WANTED = 1, /* its page is in flight */
    LOADED = 2, /* exact distance known, edges not followed yet */
    EXPANDED = 3
};

struct candidate {
    float distance;
    uint32_t position;
    enum candidate_state state;
};

struct page_slot {
    struct reader_read read;
    uint64_t page;
    uint32_t depth; /* dependent steps up to and including this read */
    bool arrived;
};

struct page_mark {
    uint32_t epoch;
    uint32_t page;
};

struct disk_search {
    struct disk_search_limits limits;
    const struct disk_index *index;
    struct search_params params;
    struct store_query query;
    float *table;
    float *scratch;

    struct candidate *list; /* ascending by (distance, position) */
    uint32_t list_count;
    uint32_t list_max;
    uint32_t cursor; /* nothing before it is UNREAD or LOADED */

    struct search_hit *hits; /* ascending by (distance, key) */
    uint32_t hit_count;

    uint32_t *filter; /* position + 1 of what was estimated lately; 0: empty */
    struct page_mark *marks;
    uint32_t mark_mask;
    uint32_t mark_count;
    uint32_t epoch;

    struct page_slot *slots;
    uint8_t *buffers;
    uint32_t flying[DISK_SEARCH_BEAM_MAX]; /* slots in the order asked for, a ring */
    uint32_t flying_first;
    uint32_t flying_count;
    uint32_t free_slots[DISK_SEARCH_BEAM_MAX];
    uint32_t free_count;
    struct reader_read *wanted[DISK_SEARCH_BEAM_MAX];
    uint32_t wanted_count;
    uint32_t outstanding; /* handed out by wanted(), not back yet */
    uint32_t beam_width;
    uint32_t depth;

    uint32_t neighbours[PAGE_DEGREE_MAX];
    uint32_t batch[START_SAMPLE];
    float estimates[START_SAMPLE];
    float estimate_scale; /* estimate = table sum * scale + bias */
    float estimate_bias;

    struct search_stats stats;
    struct error error;
    bool failed;
};

static uint32_t marks_size(uint32_t search_list_max)
{
    uint32_t size = 1024;

    while (size < search_list_max * 8)
        size *= 2;
    return size;
}

uint64_t disk_search_memory_bytes(const struct disk_search_limits *limits)
{
    return sizeof(struct disk_search) + limits->dim_max * 5ull + limits->table_floats_max * 4 +
           limits->scratch_floats_max * 4 +
           (limits->search_list_max + 1ull) * sizeof(struct candidate) +
           limits->k_max * sizeof(struct search_hit) + FILTER_SIZE * 4ull +
           marks_size(limits->search_list_max) * sizeof(struct page_mark) +
           limits->beam_width * (sizeof(struct page_slot) + (uint64_t)limits->page_bytes_max);
}

int disk_search_new(const struct disk_search_limits *limits, struct disk_search **out,
                    struct error *err)
{
    struct disk_search *s;

    if (limits->beam_width < 1 || limits->beam_width > DISK_SEARCH_BEAM_MAX ||
        limits->search_list_max < 1 || limits->search_list_max > SEARCH_LIST_MAX ||
        limits->k_max < 1 || limits->k_max > SEARCH_LIST_MAX)
        return error_set(err, ERR_INVALID,
                         "a search takes a beam of 1..%u, a list and k of 1..%u; got %u, %u, %u",
                         DISK_SEARCH_BEAM_MAX, SEARCH_LIST_MAX, limits->beam_width,
                         limits->search_list_max, limits->k_max);
    s = calloc(1, sizeof *s);
    if (!s)
        return error_set(err, ERR_NOMEM, "no memory for a search");
    s->limits = *limits;
    s->query.vector = malloc(limits->dim_max * 4ull);
    s->query.integers = malloc(limits->dim_max);
    s->table = malloc(limits->table_floats_max * 4 + 4);
    s->scratch = malloc(limits->scratch_floats_max * 4 + 4);
    s->list = malloc((limits->search_list_max + 1ull) * sizeof *s->list);
    s->hits = malloc(limits->k_max * sizeof *s->hits);
    s->filter = malloc(FILTER_SIZE * sizeof *s->filter);
    s->mark_mask = marks_size(limits->search_list_max) - 1;
    s->marks = calloc(s->mark_mask + 1ull, sizeof *s->marks);
    s->slots = calloc(limits->beam_width, sizeof *s->slots);
    s->buffers = file_buffer_alloc((uint64_t)limits->beam_width * limits->page_bytes_max);
    if (!s->query.vector || !s->query.integers || !s->table || !s->scratch || !s->list ||
        !s->hits || !s->filter || !s->marks || !s->slots || !s->buffers) {
        disk_search_free(s);
        return error_set(err, ERR_NOMEM, "no memory for a search's scratch");
    }
    *out = s;
    return 0;
}

void disk_search_free(struct disk_search *s)
{
    if (!s)
        return;
    free(s->query.vector);
    free(s->query.integers);
    free(s->table);
    free(s->scratch);
    free(s->list);
    free(s->hits);
    free(s->filter);
    free(s->marks);
    free(s->slots);
    free(s->buffers);
    free(s);
}

float search_score(enum metric metric, float distance)
{
    switch (metric) {
    case METRIC_IP:
        return -distance;
    case METRIC_COSINE:
        return 1 - distance;
    case METRIC_L2:
        break;
    }
    return distance;
}

/* ---- pages seen ---- */

/* The mark of `page`, or the empty one where it belongs. */
static struct page_mark *mark_find(struct disk_search *s, uint32_t page)
{
    uint32_t i = (page * FILTER_HASH) & s->mark_mask;

    while (s->marks[i].epoch == s->epoch && s->marks[i].page != page)
        i = (i + 1) & s->mark_mask;
    return &s->marks[i];
}

static bool page_seen(struct disk_search *s, uint32_t page)
{
    return mark_find(s, page)->epoch == s->epoch;
}

/* False when the set is three quarters full: the query has read its fill. */
static bool page_mark_seen(struct disk_search *s, uint32_t page)
{
    if (s->mark_count >= s->mark_mask / 4 * 3)
        return false;
    *mark_find(s, page) = (struct page_mark){s->epoch, page};
    s->mark_count++;
    return true;
}

/* ---- lists ---- */

static bool candidate_before(const struct candidate *a, float distance, uint32_t position)
{
    return a->distance < distance || (a->distance == distance && a->position < position);
}

static void list_insert(struct disk_search *s, float distance, uint32_t position,
                        enum candidate_state state)
{
    uint32_t low = 0, high = s->list_count;

    if (s->list_count == s->list_max &&
        !(distance < s->list[high - 1].distance ||
          (distance == s->list[high - 1].distance && position < s->list[high - 1].position)))
        return;
    while (low < high) {
        uint32_t middle = (low + high) / 2;

        if (candidate_before(&s->list[middle], distance, position))
            low = middle + 1;
        else
            high = middle;
    }
    if (low < s->list_count && s->list[low].position == position &&
        s->list[low].distance == distance)
        return; /* estimated before */
    if (s->list_count == s->list_max)
        s->list_count--;
    memmove(&s->list[low + 1], &s->list[low], (s->list_count - low) * sizeof *s->list);
    s->list[low] = (struct candidate){distance, position, state};
    s->list_count++;
    if (low < s->cursor)
        s->cursor = low;
}

static void hit_insert(struct disk_search *s, float distance, uint32_t position, int64_t key)
{
    uint32_t i = s->hit_count;

    if (i == s->params.k) {
        const struct search_hit *last = &s->hits[i - 1];

        if (distance > last->distance || (distance == last->distance && key >= last->key))
            return;
        i--;
    } else {
        s->hit_count++;
    }
    for (; i > 0; i--) {
        const struct search_hit *before = &s->hits[i - 1];

        if (before->distance < distance || (before->distance == distance && before->key < key))
            break;
        s->hits[i] = *before;
    }
    s->hits[i] = (struct search_hit){position, distance, key};
}

/* ---- the walk ---- */

static void estimate_batch(struct disk_search *s, uint32_t count)
{
    quantiser_estimate(s->index->quantiser, s->table, s->index->codes, s->batch, count,
                       s->estimates);
    s->stats.estimates += count;
    for (uint32_t i = 0; i < count; i++)
        list_insert(s, s->estimates[i] * s->estimate_scale + s->estimate_bias, s->batch[i], UNREAD);
}

static int expand(struct disk_search *s, const struct page_view *view, struct candidate *candidate)
{
    uint32_t count, batch = 0;
    uint32_t capacity = s->index->format.capacity;

    candidate->state = EXPANDED;
    s->stats.expanded++;
    if (page_view_neighbours(view, candidate->position - (uint32_t)view->first, s->neighbours,
                             &count, &s->error) < 0)
        return -1;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t position = s->neighbours[i];
        uint32_t *seen = &s->filter[(position * FILTER_HASH) >> (32 - FILTER_BITS)];

        if (*seen == position + 1)
            continue;
        *seen = position + 1;
        if (page_seen(s, position / capacity))
            continue;
        s->batch[batch++] = position;
    }
    estimate_batch(s, batch);
    return 0;
}

/* Scores a page and expands what ranks. `data` holds the page's block, verified. */
static int work_off(struct disk_search *s, uint64_t page, const uint8_t *data)
{
    const struct disk_index *index = s->index;
    struct page_view view;
    uint32_t kept = 0;

    if (page_view_open(&index->format, page, data, &view, &s->error) < 0)
        return -1;
    /* Estimates of this page's nodes give way to exact distances. */
    for (uint32_t i = 0; i < s->list_count; i++)
        if (s->list[i].position - (uint32_t)view.first >= view.node_count)
            s->list[kept++] = s->list[i];
    if (kept < s->list_count)
        s->cursor = 0;
    s->list_count = kept;
    for (uint32_t slot = 0; slot < view.node_count; slot++) {
        uint32_t position = (uint32_t)view.first + slot;
        float distance = store_distance(&s->query, page_view_vector(&view, slot));

        hit_insert(s, distance, position,
                   index->format.holds_keys ? page_view_key(&view, slot) : position);
        list_insert(s, distance, position, LOADED);
    }
    s->stats.exact += view.node_count;
    for (s->cursor = 0; s->cursor < s->list_count;) {
        struct candidate *candidate = &s->list[s->cursor];

        s->cursor++;
        if (candidate->state == LOADED && expand(s, &view, candidate) < 0)
            return -1;
    }
    s->cursor = 0;
    return 0;
}

static void ask_for(struct disk_search *s, uint64_t page)
{
    uint32_t slot_index = s->free_slots[--s->free_count];
    struct page_slot *slot = &s->slots[slot_index];
    uint32_t page_bytes = s->index->format.page_bytes;

    slot->page = page;
    slot->arrived = false;
    slot->depth = s->depth + 1;
    slot->read =
        (struct reader_read){.file = s->index->pages->file,
                             .offset = segment_block_offset(s->index->pages, page),
                             .bytes = page_bytes,
                             .buffer = s->buffers + (uint64_t)slot_index * s->limits.page_bytes_max,
                             .owner = s};
    s->flying[(s->flying_first + s->flying_count) % DISK_SEARCH_BEAM_MAX] = slot_index;
    s->flying_count++;
    s->wanted[s->wanted_count++] = &slot->read;
    s->stats.reads += page_bytes / FILE_BLOCK_BYTES;
    s->stats.read_bytes += page_bytes;
}

static int fail(struct disk_search *s)
{
    s->failed = true;
    s->wanted_count = 0;
    return -1;
}

static uint64_t now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* Takes every unread candidate, best first, until the beam is full. Resident pages are worked off
 * at once, which may put better candidates before the rest: then it starts over. */
static int choose(struct disk_search *s)
{
    uint32_t capacity = s->index->format.capacity;

    while (s->cursor < s->list_count) {
        struct candidate *candidate = &s->list[s->cursor];
        uint32_t page = candidate->position / capacity;

        if (candidate->state != UNREAD) {
            s->cursor++;
            continue;
        }
        if (page_seen(s, page)) { /* a neighbour on the page asked for it */
            candidate->state = WANTED;
            continue;
        }
        bool resident = page < s->index->resident_page_count;

        if (!resident && s->flying_count >= s->beam_width)
            return 0;
        if (!page_mark_seen(s, page)) {
            s->cursor = s->list_count;
            return 0;
        }
        if (!resident) {
            candidate->state = WANTED;
            ask_for(s, page);
            continue;
        }
        s->stats.resident_hits++;
        if (work_off(s, page,
                     s->index->resident_pages + (uint64_t)page * s->index->format.page_bytes) < 0)
            return fail(s);
    }
    return 0;
}

static int advance(struct disk_search *s)
{
    if (s->params.cancelled && __atomic_load_n(s->params.cancelled, __ATOMIC_RELAXED)) {
        error_set(&s->error, ERR_CANCELLED, "the search was cancelled");
        return fail(s);
    }
    if (s->params.deadline_us && now_us() > s->params.deadline_us) {
        error_set(&s->error, ERR_TIMEOUT, "the search passed its deadline after %u reads",
                  s->stats.reads);
        return fail(s);
    }
    if (choose(s) < 0)
        return -1;
    while (s->flying_count && s->slots[s->flying[s->flying_first]].arrived) {
        uint32_t slot_index = s->flying[s->flying_first];
        struct page_slot *slot = &s->slots[slot_index];

        s->flying_first = (s->flying_first + 1) % DISK_SEARCH_BEAM_MAX;
        s->flying_count--;
        s->depth = slot->depth > s->depth ? slot->depth : s->depth;
        if (segment_block_check(s->index->segment, s->index->pages, slot->page, slot->read.buffer,
                                &s->error) < 0 ||
            work_off(s, slot->page, slot->read.buffer) < 0)
            return fail(s);
        s->free_slots[s->free_count++] = slot_index;
        if (choose(s) < 0)
            return -1;
    }
    s->stats.rounds = s->depth;
    return 0;
}

int disk_search_begin(struct disk_search *s, const struct disk_index *index, const float *query,
                      const struct search_params *params, struct error *err)
{
    const struct disk_search_limits *limits = &s->limits;

    if (index->dim > limits->dim_max || index->format.page_bytes > limits->page_bytes_max ||
        quantiser_table_floats(index->quantiser) > limits->table_floats_max ||
        quantiser_scratch_floats(index->quantiser) > limits->scratch_floats_max || params->k < 1 ||
        params->k > limits->k_max || params->beam_width > limits->beam_width ||
        params->search_list > limits->search_list_max)
        return error_set(err, ERR_INVALID,
                         "k %u, search_list %u and beam width %u exceed what this search was sized "
                         "for (%u, %u, %u)",
                         params->k, params->search_list, params->beam_width, limits->k_max,
                         limits->search_list_max, limits->beam_width);
    s->index = index;
    s->params = *params;
    s->list_max = params->search_list > params->k ? params->search_list : params->k;
    if (s->list_max > limits->search_list_max)
        s->list_max = limits->search_list_max;
    s->beam_width = params->beam_width ? params->beam_width : limits->beam_width;
    s->list_count = s->cursor = s->hit_count = 0;
    s->flying_first = s->flying_count = s->wanted_count = s->outstanding = s->depth = 0;
    s->free_count = limits->beam_width;
    for (uint32_t i = 0; i < limits->beam_width; i++)
        s->free_slots[i] = i;
    memset(&s->stats, 0, sizeof s->stats);
    error_clear(&s->error);
    s->failed = false;
    memset(s->filter, 0, FILTER_SIZE * sizeof *s->filter);
    s->mark_count = 0;
    if (++s->epoch == 0) { /* the counter came round: old marks must not look new */
        memset(s->marks, 0, (s->mark_mask + 1ull) * sizeof *s->marks);
        s->epoch = 1;
    }
    store_query_prepare(&s->query, index->kernels, index->format.store, index->metric, index->dim,
                        query);
    /* Estimates are put on the scale of the exact distances. Squared distances to a code are too
     * small by the code's own error, on average; for cosine |q - x|^2 = 2 (1 - cos). */
    if (index->metric == METRIC_IP) {
        quantiser_table(index->quantiser, METRIC_IP, s->query.vector, s->scratch, s->table);
        s->estimate_scale = 1;
        s->estimate_bias = 0;
    } else {
        quantiser_table(index->quantiser, METRIC_L2, s->query.vector, s->scratch, s->table);
        s->estimate_scale = index->metric == METRIC_COSINE ? 0.5f : 1.0f;
        s->estimate_bias = quantiser_distortion(index->quantiser) * s->estimate_scale;
    }
    uint32_t sample = index->row_count < START_SAMPLE - 1 ? index->row_count : START_SAMPLE - 1;

    for (uint32_t i = 0; i < sample; i++)
        s->batch[i] = (uint32_t)((uint64_t)i * index->row_count / sample);
    s->batch[sample] = index->entry_point;
    estimate_batch(s, sample + 1);
    advance(s); /* a failure here is the query's, told by disk_search_error */
    return 0;
}

uint32_t disk_search_wanted(struct disk_search *s, struct reader_read **reads, uint32_t max)
{
    uint32_t count = s->wanted_count < max ? s->wanted_count : max;

    memcpy(reads, s->wanted, count * sizeof *reads);
    memmove(s->wanted, s->wanted + count, (s->wanted_count - count) * sizeof *s->wanted);
    s->wanted_count -= count;
    s->outstanding += count;
    return count;
}

int disk_search_arrived(struct disk_search *s, struct reader_read *read, struct error *err)
{
    struct page_slot *slot =
        (struct page_slot *)(void *)((char *)read - offsetof(struct page_slot, read));

    s->outstanding--;
    slot->arrived = true;
    if (!s->failed && read->error) {
        error_set_errno(&s->error, read->error, "%s: reading page %llu at byte %llu failed",
                        s->index->pages->path, (unsigned long long)slot->page,
                        (unsigned long long)read->offset);
        fail(s);
    }
    if (!s->failed)
        advance(s);
    if (s->failed && s->error.code != ERR_NONE && err && err->code == ERR_NONE)
        *err = s->error;
    return s->failed ? -1 : 0;
}

bool disk_search_done(const struct disk_search *s)
{
    if (s->failed)
        return s->outstanding == 0;
    return s->flying_count == 0 && s->wanted_count == 0;
}

int disk_search_error(const struct disk_search *s, struct error *err)
{
    if (!s->failed)
        return 0;
    if (err && err->code == ERR_NONE)
        *err = s->error;
    return -1;
}

uint32_t disk_search_hits(struct disk_search *s, struct search_hit *hits, uint32_t max)
{
    uint32_t count = s->hit_count < max ? s->hit_count : max;

    memcpy(hits, s->hits, count * sizeof *hits);
    return count;
}

const struct search_stats *disk_search_stats(const struct disk_search *s)
{
    return &s->stats;
}
