/* The list is two buffers: a merge walks the old one and the sorted additions together and writes
 * the other, at most `limit` items, so its cost is the list's length however many come in. */
#include "index/candidate_list.h"

#include <stdlib.h>
#include <string.h>

#define INSERTION_MAX 24u
#define MARKS_FIRST 512u /* of a set's part in use at the start */

static bool before(const struct listed *a, const struct listed *b)
{
    return a->distance < b->distance || (a->distance == b->distance && a->position < b->position);
}

static void insertion_sort(struct listed *items, uint32_t count)
{
    for (uint32_t i = 1; i < count; i++) {
        struct listed held = items[i];
        uint32_t at = i;

        for (; at > 0 && before(&held, &items[at - 1]); at--)
            items[at] = items[at - 1];
        items[at] = held;
    }
}

static void sift_down(struct listed *items, uint32_t root, uint32_t count)
{
    struct listed held = items[root];

    for (uint32_t child; (child = 2 * root + 1) < count; root = child) {
        if (child + 1 < count && before(&items[child], &items[child + 1]))
            child++;
        if (!before(&held, &items[child]))
            break;
        items[root] = items[child];
    }
    items[root] = held;
}

static void heap_sort(struct listed *items, uint32_t count)
{
    for (uint32_t root = count / 2; root-- > 0;)
        sift_down(items, root, count);
    for (uint32_t last = count; last-- > 1;) {
        struct listed held = items[0];

        items[0] = items[last];
        items[last] = held;
        sift_down(items, 0, last);
    }
}

/* Quicksort that turns to heapsort when its splits are bad: no input costs more than n log n. */
static void sort(struct listed *items, uint32_t count, uint32_t depth)
{
    while (count > INSERTION_MAX) {
        uint32_t i = 0, j = count - 1;
        struct listed *a = &items[0], *b = &items[count / 2], *c = &items[count - 1];
        struct listed pivot = *(before(a, b) ? (before(b, c)   ? b
                                                : before(a, c) ? c
                                                               : a)
                                             : (before(a, c)   ? a
                                                : before(b, c) ? c
                                                               : b));

        if (depth-- == 0) {
            heap_sort(items, count);
            return;
        }
        for (;;) {
            while (before(&items[i], &pivot))
                i++;
            while (before(&pivot, &items[j]))
                j--;
            if (i >= j)
                break;
            struct listed held = items[i];

            items[i++] = items[j];
            items[j--] = held;
        }
        if (i == 0)
            i = 1;
        if (i < count - i) {
            sort(items, i, depth);
            items += i;
            count -= i;
        } else {
            sort(items + i, count - i, depth);
            count = i;
        }
    }
    insertion_sort(items, count);
}

int candidate_list_init(struct candidate_list *list, uint32_t capacity, uint32_t fresh_max,
                        struct error *err)
{
    *list = (struct candidate_list){.capacity = capacity, .fresh_max = fresh_max};
    list->items = malloc(capacity * sizeof *list->items);
    list->spare = malloc(capacity * sizeof *list->spare);
    list->fresh = malloc(fresh_max * sizeof *list->fresh);
    if (list->items && list->spare && list->fresh)
        return 0;
    candidate_list_release(list);
    return error_set(err, ERR_NOMEM, "no memory for a list of %u candidates", capacity);
}

void candidate_list_release(struct candidate_list *list)
{
    free(list->items);
    free(list->spare);
    free(list->fresh);
    *list = (struct candidate_list){0};
}

uint64_t candidate_list_memory_bytes(uint32_t capacity, uint32_t fresh_max)
{
    return (2ull * capacity + fresh_max) * sizeof(struct listed);
}

void candidate_list_clear(struct candidate_list *list, uint32_t limit)
{
    list->count = 0;
    list->fresh_count = 0;
    list->gone = false;
    list->limit = limit < list->capacity ? limit : list->capacity;
}

void candidate_list_merge(struct candidate_list *list)
{
    const struct listed *old = list->items, *old_end = old + list->count;
    const struct listed *fresh = list->fresh, *fresh_end = fresh + list->fresh_count;
    struct listed *out = list->spare;
    struct listed *end = out + list->limit;

    if (!list->fresh_count && !list->gone)
        return;
    list->gone = false;
    sort(list->fresh, list->fresh_count, 24);
    while (out < end) {
        while (old < old_end && old->state == LISTED_GONE)
            old++;
        if (fresh == fresh_end) {
            if (old == old_end)
                break;
            *out++ = *old++;
        } else if (old < old_end && !before(fresh, old)) {
            if (fresh->position == old->position && fresh->distance == old->distance)
                fresh++; /* estimated before */
            else
                *out++ = *old++;
        } else {
            if (out == list->spare || out[-1].position != fresh->position ||
                out[-1].distance != fresh->distance)
                *out++ = *fresh;
            fresh++;
        }
    }
    list->count = (uint32_t)(out - list->spare);
    list->spare = list->items;
    list->items = out - list->count;
    list->fresh_count = 0;
}

static uint32_t marks_size(uint32_t expected)
{
    uint32_t size = 256;

    while (size < 2 * (uint64_t)expected && size < 1u << 30)
        size *= 2;
    return size;
}

int mark_set_init(struct mark_set *set, uint32_t expected, struct error *err)
{
    *set = (struct mark_set){.size = marks_size(expected)};
    set->marks = calloc(set->size, sizeof *set->marks);
    if (!set->marks)
        return error_set(err, ERR_NOMEM, "no memory for a set of %u marks", expected);
    mark_set_clear(set);
    return 0;
}

void mark_set_release(struct mark_set *set)
{
    free(set->marks);
    *set = (struct mark_set){0};
}

uint64_t mark_set_memory_bytes(uint32_t expected)
{
    return (uint64_t)marks_size(expected) * sizeof(struct mark);
}

static void use_part(struct mark_set *set, uint32_t size)
{
    set->mask = size - 1;
    set->shift = 32 - (uint32_t)__builtin_ctz(size);
}

static void next_epoch(struct mark_set *set)
{
    if (++set->epoch == 0) { /* came round: old marks must not look new */
        memset(set->marks, 0, set->size * sizeof *set->marks);
        set->epoch = 1;
    }
}

void mark_set_clear(struct mark_set *set)
{
    use_part(set, set->size < MARKS_FIRST ? set->size : MARKS_FIRST);
    set->count = 0;
    next_epoch(set);
}

/* Entries move within the one array: each that stands in a mover's way is taken out and moves
 * next. At the last epoch there is none to move to; then the set stays as it is. */
bool mark_set_grow(struct mark_set *set)
{
    uint32_t old_size = set->mask + 1, old = set->epoch;

    if (old_size >= set->size || old == UINT32_MAX)
        return false;
    use_part(set, 2 * old_size);
    set->epoch++;
    for (uint32_t i = 0; i < old_size; i++) {
        struct mark moving = set->marks[i];

        if (moving.epoch != old)
            continue;
        set->marks[i].epoch = 0;
        while (moving.epoch == old) {
            struct mark *place = mark_set_find(set, moving.number);
            struct mark held = *place;

            *place = (struct mark){set->epoch, moving.number, moving.value};
            moving = held;
        }
    }
    return true;
}
