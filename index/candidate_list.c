/* The lists are unsorted columns with some room beyond their limit. When that is used up they are
 * cut back: the limit-th least distance is found by halving the range of floats and counting how
 * many lie below, 32 passes over a few registers' worth, once in ROOM additions. */
#include "index/candidate_list.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ROOM 128u
#define ALIGNMENT 64u
#define PAGES_FIRST 128u /* of a set's part in use at the start */
#define BUCKETS_MIN 64u

static uint64_t padded(uint32_t count)
{
    return ((uint64_t)count * 4 + ALIGNMENT - 1) & ~(uint64_t)(ALIGNMENT - 1);
}

/* Floats and their order as whole numbers. */
static uint32_t order_of(float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static float of_order(uint32_t order)
{
    uint32_t bits = order & 0x80000000u ? order & 0x7fffffffu : ~order;
    float value;

    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The nth least (from 1) of `count` values, and how many of them are equal to it and among the n
 * least. */
static float nth_least(const struct list_kernels *kernels, const float *values, uint32_t count,
                       uint32_t nth, uint32_t *ties)
{
    uint32_t low = order_of(-INFINITY), high = order_of(INFINITY);

    while (low < high) {
        uint32_t middle = high - (high - low) / 2; /* above low */

        if (kernels->below(values, count, of_order(middle)) >= nth)
            high = middle - 1;
        else
            low = middle;
    }
    /* Zero has two signs, which count as equal. */
    float least = of_order(low);

    *ties = nth - kernels->below(values, count, least);
    return least;
}

int candidate_list_init(struct candidate_list *list, uint32_t capacity, struct error *err)
{
    uint64_t column = padded(capacity + ROOM);
    uint8_t *block = aligned_alloc(ALIGNMENT, 4 * column);

    *list = (struct candidate_list){.kernels = list_kernels_best(), .capacity = capacity};
    if (!block)
        return error_set(err, ERR_NOMEM, "no memory for a list of %u candidates", capacity);
    list->columns = (struct candidate_columns){
        .distance = (float *)(void *)block,
        .sharpness = (float *)(void *)(block + column),
        .position = (uint32_t *)(void *)(block + 2 * column),
        .page = (uint32_t *)(void *)(block + 3 * column),
    };
    return 0;
}

void candidate_list_release(struct candidate_list *list)
{
    free(list->columns.distance);
    *list = (struct candidate_list){0};
}

uint64_t candidate_list_memory_bytes(uint32_t capacity)
{
    return 4 * padded(capacity + ROOM);
}

void candidate_list_clear(struct candidate_list *list, uint32_t limit)
{
    list->count = 0;
    list->limit = limit < list->capacity ? limit : list->capacity;
    list->room = list->limit + ROOM;
    list->bound = INFINITY;
}

void candidate_list_cut(struct candidate_list *list)
{
    uint32_t ties;

    if (list->count < list->limit || list->limit == 0)
        return;
    list->bound = nth_least(list->kernels, list->columns.distance, list->count, list->limit, &ties);
    list->count = list->kernels->drop_beyond(&list->columns, list->count, list->bound, ties);
}

int scored_list_init(struct scored_list *list, uint32_t capacity, struct error *err)
{
    *list = (struct scored_list){.kernels = list_kernels_best()};
    list->distances = aligned_alloc(ALIGNMENT, padded(capacity + ROOM));
    if (!list->distances)
        return error_set(err, ERR_NOMEM, "no memory for %u distances", capacity);
    return 0;
}

void scored_list_release(struct scored_list *list)
{
    free(list->distances);
    *list = (struct scored_list){0};
}

uint64_t scored_list_memory_bytes(uint32_t capacity)
{
    return padded(capacity + ROOM);
}

void scored_list_clear(struct scored_list *list, uint32_t limit)
{
    list->count = 0;
    list->limit = limit;
    list->room = limit + ROOM;
    list->bound = INFINITY;
}

void scored_list_cut(struct scored_list *list)
{
    uint32_t ties, kept = 0;

    if (list->count < list->limit || list->limit == 0)
        return;
    list->bound = nth_least(list->kernels, list->distances, list->count, list->limit, &ties);
    for (uint32_t i = 0; i < list->count; i++) {
        float distance = list->distances[i];

        if (distance < list->bound || (distance == list->bound && ties && ties--))
            list->distances[kept++] = distance;
    }
    list->count = kept;
}

/* ---- sets ---- */

static uint32_t size_for(uint64_t wanted, uint32_t least)
{
    uint32_t size = least;

    while (size < wanted && size < 1u << 30)
        size *= 2;
    return size;
}

static uint32_t shift_of(uint32_t size)
{
    return 32 - (uint32_t)__builtin_ctz(size);
}

int page_set_init(struct page_set *set, uint32_t expected, struct error *err)
{
    *set = (struct page_set){.size = size_for(2ull * expected, PAGES_FIRST)};
    set->marks = calloc(set->size, sizeof *set->marks);
    if (!set->marks)
        return error_set(err, ERR_NOMEM, "no memory for a set of %u pages", expected);
    page_set_clear(set);
    return 0;
}

void page_set_release(struct page_set *set)
{
    free(set->marks);
    *set = (struct page_set){0};
}

uint64_t page_set_memory_bytes(uint32_t expected)
{
    return (uint64_t)size_for(2ull * expected, PAGES_FIRST) * sizeof(struct page_mark);
}

static void use_part(struct page_set *set, uint32_t size)
{
    set->mask = size - 1;
    set->shift = shift_of(size);
}

static void next_epoch(struct page_set *set)
{
    if (++set->epoch == 0) { /* came round: old marks must not look new */
        memset(set->marks, 0, set->size * sizeof *set->marks);
        set->epoch = 1;
    }
}

void page_set_clear(struct page_set *set)
{
    use_part(set, PAGES_FIRST);
    set->count = 0;
    next_epoch(set);
}

/* Entries move within the one array: each that stands in a mover's way is taken out and moves
 * next. At the last epoch there is none to move to; then the set stays as it is. */
static void grow(struct page_set *set)
{
    uint32_t old_size = set->mask + 1, old = set->epoch;

    if (old_size >= set->size || old == UINT32_MAX)
        return;
    use_part(set, 2 * old_size);
    set->epoch++;
    for (uint32_t i = 0; i < old_size; i++) {
        struct page_mark moving = set->marks[i];

        if (moving.epoch != old)
            continue;
        set->marks[i].epoch = 0;
        while (moving.epoch == old) {
            struct page_mark *place = page_set_place(set, moving.page);
            struct page_mark held = *place;

            *place = (struct page_mark){set->epoch, moving.page};
            moving = held;
        }
    }
}

bool page_set_add(struct page_set *set, uint32_t page)
{
    struct page_mark *place;

    if (set->count > set->mask / 2)
        grow(set);
    place = page_set_place(set, page);
    if (place->epoch == set->epoch)
        return true;
    if (set->count >= set->mask / 4 * 3)
        return false;
    set->count++;
    *place = (struct page_mark){set->epoch, page};
    return true;
}

/* A quarter of the places taken: few buckets overflow. */
static uint32_t buckets_for(uint32_t expected)
{
    return size_for(expected, BUCKETS_MIN);
}

int cell_set_init(struct cell_set *set, uint32_t expected, struct error *err)
{
    *set = (struct cell_set){.size = buckets_for(expected)};
    set->buckets = aligned_alloc(ALIGNMENT, cell_set_memory_bytes(expected));
    if (!set->buckets)
        return error_set(err, ERR_NOMEM, "no memory for a set of %u cells", expected);
    cell_set_clear(set, 0);
    return 0;
}

void cell_set_release(struct cell_set *set)
{
    free(set->buckets);
    *set = (struct cell_set){0};
}

uint64_t cell_set_memory_bytes(uint32_t expected)
{
    return (uint64_t)buckets_for(expected) * CELL_BUCKET * sizeof(uint32_t);
}

void cell_set_clear(struct cell_set *set, uint32_t expected)
{
    uint32_t size = buckets_for(expected);

    size = size < set->size ? size : set->size;
    set->shift = shift_of(size);
    memset(set->buckets, 0, (uint64_t)size * CELL_BUCKET * sizeof *set->buckets);
}

void cell_set_add(struct cell_set *set, uint32_t cell)
{
    uint32_t *bucket = set->buckets + (uint64_t)((cell * 2654435769u) >> set->shift) * CELL_BUCKET;

    for (uint32_t i = 0; i < CELL_BUCKET; i++) {
        if (bucket[i] == 0) {
            bucket[i] = cell + 1;
            return;
        }
    }
}
