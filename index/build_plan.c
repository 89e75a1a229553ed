/* How it works: each phase's modules say what they take (their *_memory_bytes functions); what
 * stands here is which of them are there at the same time. PROCESS_BYTES is the program itself,
 * OpenBLAS' buffers and what the allocator keeps. */
#include "index/build_plan.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "index/calibrate.h"
#include "index/leaf_graph.h"
#include "index/page_codec.h"
#include "index/page_layout.h"
#include "index/segment_parts.h"
#include "index/vamana.h"

#define PROCESS_BYTES (24u << 20)
#define WORKER_BYTES (3u << 20) /* stacks as far as they are used, OpenBLAS' buffer */
#define TRAIN_ROWS 65536u
#define CALIBRATE_BYTES (24u << 20)

static void phase_add(struct build_plan *plan, const char *name, const char *what, uint64_t bytes)
{
    if (bytes > plan->memory_bytes) {
        plan->memory_bytes = bytes;
        plan->greatest = plan->phase_count;
    }
    plan->phases[plan->phase_count++] = (struct build_plan_phase){name, what, bytes};
}

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

uint64_t build_plan_process_bytes(uint32_t workers)
{
    return PROCESS_BYTES + (uint64_t)workers * WORKER_BYTES;
}

void build_plan_make(const struct row_shape *shape, uint64_t rows,
                     const struct segment_build_params *params, uint32_t workers,
                     struct build_plan *plan)
{
    const struct leaf_graph_params graph = {params->max_degree, params->alpha, params->seed, 0, 0};
    const struct vamana_params vamana = {params->max_degree, params->build_list, params->alpha,
                                         params->seed};
    uint64_t base = build_plan_process_bytes(workers);
    uint64_t limit = params->memory_bytes ? params->memory_bytes : UINT64_MAX;
    uint64_t left = limit > base ? limit - base : 0;
    uint64_t held = rows * shape->stride;
    uint64_t train = least(rows, TRAIN_ROWS) * shape->dim * 4ull * 3;
    uint64_t leaf = leaf_graph_memory_bytes(shape, rows, &graph, workers, true);
    uint64_t window = 0, order, partition;
    struct page_format format;
    uint64_t page_bytes;

    memset(plan, 0, sizeof *plan);
    /* Few rows take less than what gathers them when they are not held. */
    plan->hold = params->builder == GRAPH_BUILDER_INSERT || held + leaf <= left ||
                 held + leaf <= leaf_graph_memory_bytes(shape, rows, &graph, workers, false);
    if (!plan->hold)
        leaf = leaf_graph_memory_bytes(shape, rows, &graph, workers, false);
    partition = partition_memory_full(shape, rows, workers);
    if (partition > left)
        partition = partition_memory_min(shape, rows, workers);
    if (page_format_choose(&format, (enum vector_store)params->store, params->metric, shape->dim,
                           params->max_degree, (uint32_t)rows, true, false, NULL) < 0)
        format.capacity = 1, format.page_bytes = 4096;
    order = page_layout_memory_bytes(rows, 0, shape->stride, LEAF_GRAPH_LIST_PLACES,
                                     format.capacity, workers);
    if (order + rows * 8 > left) {
        window = page_layout_window_rows((uint32_t)rows, left > rows * 8 ? left - rows * 8 : 0,
                                         shape->stride, LEAF_GRAPH_LIST_PLACES, format.capacity,
                                         workers);
        window = window ? window : 65536;
        order = page_layout_memory_bytes(rows, (uint32_t)window, shape->stride,
                                         LEAF_GRAPH_LIST_PLACES, format.capacity, workers);
    }
    plan->window_rows = (uint32_t)window;
    phase_add(plan, "train", "a sample of the rows as floats, thrice", base + train);
    phase_add(plan, "partition", "a sample in space order, a leaf number a row, rows on their way",
              base + partition);
    if (params->builder == GRAPH_BUILDER_INSERT)
        phase_add(plan, "graph", "all rows, the graph and its lists",
                  base + held + vamana_memory_bytes(rows, &vamana, workers) +
                      rows * LEAF_GRAPH_LIST_PLACES * 4ull);
    else
        phase_add(plan, "graph",
                  plan->hold ? "all rows, pools of candidates, runs of edges"
                             : "pools of candidates, rows gathered, runs of edges",
                  base + leaf + (plan->hold ? held : 0));
    phase_add(plan, "connect", "where each row was reached from", base + rows * 5 + (4u << 20));
    phase_add(plan, "order",
              window ? "a window of rows and its neighbour lists" : "neighbour lists, both ways",
              base + order + rows * 8);
    phase_add(plan, "sections", "positions, places and numbers of rows, sorted keys",
              base + rows * 12 +
                  segment_parts_memory_bytes(rows, shape->dim, shape->raw_bytes, params->max_degree,
                                             workers));
    phase_add(plan, "calibrate", "codes and cells of the index, pages read",
              base + rows * 4 + rows * params->code_bytes + rows * 2 + CALIBRATE_BYTES);

    page_bytes = (rows + format.capacity - 1) / format.capacity * format.page_bytes;
    plan->index_bytes =
        page_bytes + rows * params->code_bytes + rows * shape->dim / 64 +
        (params->keep_originals && shape->element == ELEMENT_F32 ? rows * shape->raw_bytes : 0) +
        rows * 6 + (1u << 20);
    plan->scratch_bytes = rows * (shape->raw_bytes + 8) + leaf_graph_scratch_bytes(rows, &graph);
    if (partition_scratch_bytes(shape, rows, left) > plan->scratch_bytes)
        plan->scratch_bytes = partition_scratch_bytes(shape, rows, left);
}

int build_plan_check(const struct build_plan *plan, const char *input, uint64_t memory_bytes,
                     struct error *err)
{
    const struct build_plan_phase *phase = &plan->phases[plan->greatest];

    if (!memory_bytes || plan->memory_bytes <= memory_bytes)
        return 0;
    error_set(err, ERR_BUDGET,
              "building from %s takes %" PRIu64 " MiB of memory in phase '%s' (%s); --memory "
              "grants %" PRIu64 " MiB",
              input, (plan->memory_bytes + (1 << 20) - 1) >> 20, phase->name, phase->what,
              memory_bytes >> 20);
    error_remedy(err, "grant %" PRIu64 " MiB, or use fewer --threads or a lower --max-degree",
                 (plan->memory_bytes + (1 << 20) - 1) >> 20);
    return -1;
}
