/* A search: parsed and checked on the HTTP thread, run by the engine, encoded where it does least
 * harm: a small answer on the HTTP thread again, which is one hop less, a large one on a worker, so
 * that the connections that share the HTTP thread do not wait for it. Rows are fetched and written
 * in batches: what an answer holds at a time is bounded, however many rows it has. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "src/api.h"
#include "src/collection_rows.h"
#include "src/collection_search.h"

#define BATCH_ROWS 256u
#define INLINE_FETCH_MAX 32u  /* rows fetched on an HTTP thread */
#define INLINE_ROWS_MAX 2048u /* rows written on an HTTP thread without fetching */

struct entity_call {
    struct worker_task task; /* first */
    struct http_exchange *exchange;
    struct collection *collection;
    struct output_plan plan;
    bool is_search;
    bool int64_as_text;
    struct rest_search search;
    struct rest_get get;
    uint32_t field;
    enum metric metric;
    struct collection_search *running;
    struct result_row *rows;
    uint32_t row_count;
    uint32_t *counts;
};

static bool plan_fetches(const struct output_plan *plan)
{
    return plan->records || plan->vectors;
}

static void write_value(struct json_writer *writer, const struct schema_field *field,
                        const struct value *value, bool int64_as_text)
{
    switch (value->type) {
    case VALUE_NULL:
        json_null(writer);
        break;
    case VALUE_BOOL:
        json_bool(writer, value->boolean);
        break;
    case VALUE_INT64:
        rest_write_int64(writer, value->integer,
                         int64_as_text && field && field->type == FIELD_INT64);
        break;
    case VALUE_FLOAT:
        json_float(writer, (float)value->real);
        break;
    case VALUE_DOUBLE:
        json_double(writer, value->real);
        break;
    case VALUE_TEXT:
        json_string_bytes(writer, value->text, value->text_bytes);
        break;
    case VALUE_NUMBER:
        json_raw(writer, value->text, value->text_bytes);
        break;
    case VALUE_JSON:
        if (field && field->type == FIELD_ARRAY)
            rest_write_array(writer, field->element_type, value->text, value->text_bytes);
        else if (field)
            json_string_bytes(writer, value->text, value->text_bytes);
        else
            json_raw(writer, value->text, value->text_bytes);
        break;
    }
}

static bool dynamic_wanted(const struct entity_call *call, const char *name, uint32_t bytes)
{
    const struct output_plan *plan = &call->plan;

    /* The search's own key wins over a dynamic one of that name. */
    if (call->is_search && bytes == 8 && memcmp(name, "distance", 8) == 0)
        return false;
    if (plan->all_dynamic)
        return true;
    for (uint32_t i = 0; i < plan->dynamic_count; i++) {
        if (strlen(plan->dynamic[i]) == bytes && memcmp(plan->dynamic[i], name, bytes) == 0)
            return true;
    }
    return false;
}

/* Scalars of a row: those of the record, then null for wanted fields it lacks. */
static int write_record(struct json_writer *writer, const struct entity_call *call,
                        const struct rows_record *record, struct error *err)
{
    const struct schema *schema = call->collection->index->schema;
    bool written[SCHEMA_FIELD_MAX] = {false};
    struct record_cursor cursor;
    struct value value;
    const char *name;
    uint32_t name_bytes;
    uint32_t id;
    int more = 0;

    if (record->data && record_open(record->data, record->bytes, &cursor, err) < 0)
        return -1;
    while (record->data &&
           (more = record_next(&cursor, &id, &name, &name_bytes, &value, err)) > 0) {
        const struct schema_field *field = id ? schema_find_id(schema, id) : NULL;

        if (id == 0 && dynamic_wanted(call, name, name_bytes)) {
            json_key_bytes(writer, name, name_bytes);
            write_value(writer, NULL, &value, false);
        } else if (field && call->plan.fields[field - schema->fields]) {
            json_key(writer, field->name);
            write_value(writer, field, &value, call->int64_as_text);
            written[field - schema->fields] = true;
        }
    }
    for (uint32_t i = 0; i < schema->field_count; i++) {
        const struct schema_field *field = &schema->fields[i];

        if (call->plan.fields[i] && !written[i] && !field_type_is_vector(field->type) &&
            !field->primary) {
            json_key(writer, field->name);
            json_null(writer);
        }
    }
    return more;
}

static int write_row(struct json_writer *writer, const struct entity_call *call,
                     const struct result_row *row, const struct row_set *set, uint32_t i,
                     struct error *err)
{
    const struct index_directory *index = call->collection->index;
    const struct schema_field *key = schema_key(index->schema);
    const struct schema_field *field;

    json_begin_object(writer);
    /* A VarChar key is a value of the record. */
    if (key && key->type == FIELD_INT64) {
        json_key(writer, key->name);
        rest_write_int64(writer, row->key, call->int64_as_text);
    }
    if (call->is_search) {
        float score = search_score(call->metric, row->distance);

        /* Rounding must not show a similarity that cannot be. */
        if (call->metric == METRIC_COSINE)
            score = score > 1 ? 1 : score < -1 ? -1 : score;
        json_key(writer, "distance");
        json_float(writer, score);
    }
    if (set->records && write_record(writer, call, &set->records[i], err) < 0)
        return -1;
    for (uint32_t f = 0; (field = schema_vector(index->schema, f)) != NULL; f++) {
        const struct index_segment *segment = &index->segments[row->segment];

        if (!set->vectors[f])
            continue;
        json_key(writer, field->name);
        rest_write_vector(writer, field->type, segment->fields[f]->element, field->dim,
                          set->vectors[f] + i * set->vector_bytes[f]);
    }
    json_end_object(writer);
    return 0;
}

static int write_rows(struct json_writer *writer, const struct entity_call *call, struct error *err)
{
    const struct service *service = api_service(call->exchange);
    struct reader *reader = NULL;

    if (plan_fetches(&call->plan) && service_reader(service, &reader, err) < 0)
        return -1;
    json_begin_array(writer);
    for (uint32_t first = 0; first < call->row_count; first += BATCH_ROWS) {
        uint32_t left = call->row_count - first;
        uint32_t n = left < BATCH_ROWS ? left : BATCH_ROWS;
        const struct result_row *rows = call->rows + first;
        struct row_set set;
        int rc;

        if (json_writer_failed(writer))
            break; /* too large: api_reply says so */
        if (__atomic_load_n(http_cancelled(call->exchange), __ATOMIC_RELAXED))
            return error_set(err, ERR_CANCELLED, "the client left while rows were fetched");
        if (http_now_us() > http_deadline_us(call->exchange))
            return error_set(err, ERR_TIMEOUT, "the deadline passed while rows were fetched");
        rc =
            collection_rows_fetch(call->collection->index, reader, rows, n, &call->plan, &set, err);
        for (uint32_t i = 0; rc == 0 && i < n; i++)
            rc = write_row(writer, call, &rows[i], &set, i, err);
        row_set_release(&set);
        if (rc < 0)
            return -1;
    }
    json_end_array(writer);
    return 0;
}

/* Below k hits the expected gain has no bound, and JSON no infinity. */
static void write_figure(struct json_writer *writer, const char *key, float value)
{
    json_key(writer, key);
    if (isfinite(value))
        json_float(writer, value);
    else
        json_null(writer);
}

static void write_count(struct json_writer *writer, const char *key, uint64_t value)
{
    json_key(writer, key);
    json_uint64(writer, value);
}

/* The rule of each segment; they differ with its calibration and its rows. */
static void write_part(struct json_writer *writer, const struct search_part *part)
{
    const struct walk_rule *rule = &part->params.rule;

    json_begin_object(writer);
    write_count(writer, "rows", part->index->row_count);
    write_figure(writer, "resident_share", (float)disk_index_resident_share(part->index));
    json_key(writer, "calibrated");
    json_bool(writer, part->calibrated);
    json_key(writer, "given_by");
    json_string(writer, part->effort.given_by);
    json_key(writer, "rule");
    json_begin_object(writer);
    json_key(writer, "recall_target");
    if (part->effort.recall_target > 0)
        json_double(writer, part->effort.recall_target);
    else
        json_null(writer);
    write_count(writer, "search_list", rule->search_list);
    write_count(writer, "cells", rule->cells);
    write_count(writer, "patience", rule->patience);
    write_figure(writer, "gain", rule->gain);
    json_end_object(writer);
    json_key(writer, "reads_expected");
    if (part->reads_expected > 0)
        json_float(writer, part->reads_expected);
    else
        json_null(writer);
    write_count(writer, "beam_width", part->params.beam_width);
    if (part->params.reads_max > 0)
        write_count(writer, "reads_max", part->params.reads_max);
    json_end_object(writer);
}

static void write_query(struct json_writer *writer, const struct collection_search *search,
                        uint32_t query)
{
    struct search_stats stats;
    bool stopped[STOP_READS + 1];

    collection_search_query(search, query, &stats, stopped);
    json_begin_object(writer);
    write_count(writer, "rounds", stats.rounds);
    write_count(writer, "reads", stats.reads);
    write_count(writer, "read_bytes", stats.read_bytes);
    write_count(writer, "resident_hits", stats.resident_hits);
    write_count(writer, "cells", stats.cells);
    write_count(writer, "scanned", stats.scanned);
    write_count(writer, "estimates", stats.estimates);
    write_count(writer, "expanded", stats.expanded);
    write_count(writer, "exact", stats.exact);
    write_figure(writer, "gain", stats.gain);
    json_key(writer, "stop");
    json_begin_array(writer);
    for (uint32_t s = STOP_GAIN; s <= STOP_READS; s++) {
        if (stopped[s])
            json_string(writer, search_stop_name((enum search_stop)s));
    }
    json_end_array(writer);
    json_key(writer, "time_us");
    json_begin_object(writer);
    write_figure(writer, "prepare", stats.prepare_us);
    write_figure(writer, "seed", stats.seed_us);
    write_figure(writer, "score", stats.score_us);
    write_figure(writer, "expand", stats.expand_us);
    write_figure(writer, "exact", stats.exact_us);
    json_end_object(writer);
    write_figure(writer, "latency_us", stats.latency_us);
    json_end_object(writer);
}

/* "explain":{"exact_scores":..,"segments":[..],"queries":[..]}: a key that the contract does not
 * have, so only who asks gets it. */
static void write_explain(struct json_writer *writer, const struct entity_call *call)
{
    const struct search_part *parts;
    uint32_t part_count = collection_search_parts(call->running, &parts);

    json_key(writer, "explain");
    json_begin_object(writer);
    json_key(writer, "exact_scores");
    json_bool(writer, call->search.request.tuning.exact_scores);
    json_key(writer, "segments");
    json_begin_array(writer);
    for (uint32_t i = 0; i < part_count; i++)
        write_part(writer, &parts[i]);
    json_end_array(writer);
    json_key(writer, "queries");
    json_begin_array(writer);
    for (uint32_t i = 0; i < call->search.request.query_count; i++)
        write_query(writer, call->running, i);
    json_end_array(writer);
    json_end_object(writer);
}

/* {"code":0,"cost":0,"data":[rows],"topks":[..]} */
static void reply_rows(struct entity_call *call)
{
    struct failure failure = {0};
    struct error err = ERROR_INIT;
    struct json_writer writer;

    json_writer_init(&writer, REQUEST_ANSWER_BYTES_MAX);
    json_begin_object(&writer);
    json_key(&writer, "code");
    json_int64(&writer, 0);
    json_key(&writer, "cost");
    json_int64(&writer, 0);
    json_key(&writer, "data");
    if (write_rows(&writer, call, &err) < 0) {
        json_writer_release(&writer);
        api_failure_from_error(call->exchange, &err, &failure);
        api_fail(call->exchange, &failure);
        return;
    }
    if (call->is_search && call->row_count > 0) {
        json_key(&writer, "topks");
        json_begin_array(&writer);
        for (uint32_t i = 0; i < call->search.request.query_count; i++)
            json_int64(&writer, call->counts[i]);
        json_end_array(&writer);
    }
    if (call->is_search && call->search.request.tuning.explain)
        write_explain(&writer, call);
    json_end_object(&writer);
    api_reply(call->exchange, &writer);
}

static void fail_error(struct http_exchange *exchange, const struct error *err)
{
    struct failure failure = {0};

    api_failure_from_error(exchange, err, &failure);
    api_fail(exchange, &failure);
}

static struct entity_call *call_new(struct http_exchange *exchange, struct failure *failure)
{
    struct entity_call *call = arena_alloc(http_arena(exchange), sizeof *call);

    if (!call) {
        failure_set(failure, FAILURE_MEMORY, "memory limit exceeded");
        return NULL;
    }
    call->exchange = exchange;
    call->int64_as_text = api_int64_as_text(exchange);
    http_set_call(exchange, call);
    return call;
}

/* Search. */

/* Rows of equal distance stand by ascending key. Int64 keys come with the hits and are in order;
 * text keys have to be fetched for the rows that tie. */
struct tied {
    struct result_row row;
    const char *text;
    uint32_t bytes;
};

static int compare_tied(const void *left, const void *right)
{
    const struct tied *a = left;
    const struct tied *b = right;
    uint32_t shorter = a->bytes < b->bytes ? a->bytes : b->bytes;
    int order = shorter > 0 ? memcmp(a->text, b->text, shorter) : 0;

    if (order != 0)
        return order;
    return a->bytes < b->bytes ? -1 : a->bytes > b->bytes;
}

static int sort_tied(struct entity_call *call, struct reader *reader, struct result_row *rows,
                     uint32_t count, struct error *err)
{
    const struct index_directory *index = call->collection->index;
    const struct output_plan plan = {.records = true};
    struct tied *tied = malloc(count * sizeof *tied);
    struct row_set set;
    int rc = -1;

    memset(&set, 0, sizeof set);
    if (!tied) {
        error_set(err, ERR_NOMEM, "no memory for %u rows", count);
        goto done;
    }
    if (collection_rows_fetch(index, reader, rows, count, &plan, &set, err) < 0)
        goto done;
    for (uint32_t i = 0; i < count; i++) {
        tied[i].row = rows[i];
        if (collection_row_key(index->schema, &set, i, &tied[i].text, &tied[i].bytes, err) < 0)
            goto done;
    }
    qsort(tied, count, sizeof *tied, compare_tied);
    for (uint32_t i = 0; i < count; i++)
        rows[i] = tied[i].row;
    rc = 0;
done:
    row_set_release(&set);
    free(tied);
    return rc;
}

static int sort_ties(struct entity_call *call, struct error *err)
{
    struct reader *reader = NULL;
    uint32_t first = 0;

    for (uint32_t q = 0; q < call->search.request.query_count; q++) {
        uint32_t end = first + call->counts[q];

        while (first < end) {
            uint32_t next = first + 1;

            while (next < end && call->rows[next].distance == call->rows[first].distance)
                next++;
            if (next - first > 1 &&
                ((!reader && service_reader(api_service(call->exchange), &reader, err) < 0) ||
                 sort_tied(call, reader, call->rows + first, next - first, err) < 0))
                return -1;
            first = next;
        }
    }
    return 0;
}

static void count_search(const struct entity_call *call, const struct search_totals *totals)
{
    struct collection_metrics *metrics = &call->collection->metrics;
    struct search_stats stats;
    bool stopped[STOP_READS + 1];

    atomic_fetch_add(&metrics->rounds, totals->rounds);
    atomic_fetch_add(&metrics->reads, totals->reads);
    atomic_fetch_add(&metrics->resident_hits, totals->resident_hits);
    atomic_fetch_add(&metrics->scanned, totals->scanned);
    atomic_fetch_add(&metrics->estimates, totals->estimates);
    atomic_fetch_add(&metrics->exact, totals->exact);
    for (uint32_t s = STOP_GAIN; s <= STOP_READS; s++)
        atomic_fetch_add(&metrics->stops[s], totals->stops[s]);
    for (uint32_t q = 0; q < call->search.request.query_count; q++) {
        collection_search_query(call->running, q, &stats, stopped);
        histogram_add_reads(&metrics->search_reads, stats.reads);
    }
    atomic_fetch_add(&metrics->queries, call->search.request.query_count);
    atomic_fetch_add(&metrics->searches, 1);
}

static void search_finish(struct entity_call *call)
{
    struct collection_metrics *metrics = &call->collection->metrics;
    const struct schema_field *key = schema_key(call->collection->index->schema);
    struct search_totals totals;
    struct error err = ERROR_INIT;
    uint64_t started_us = http_started_us(call->exchange);

    if (collection_search_finish(call->running, &call->rows, &call->row_count, &call->counts,
                                 &totals, &err) < 0 ||
        (key && key->type == FIELD_VARCHAR && sort_ties(call, &err) < 0)) {
        atomic_fetch_add(&metrics->searches_failed, 1);
        if (err.code == ERR_TIMEOUT)
            atomic_fetch_add(&metrics->searches_expired, 1);
        if (err.code == ERR_CANCELLED)
            atomic_fetch_add(&metrics->searches_cancelled, 1);
        fail_error(call->exchange, &err);
        return;
    }
    count_search(call, &totals);
    histogram_add_latency(&metrics->search_latency, http_now_us() - started_us);
    reply_rows(call);
}

static void search_on_http(struct http_exchange *exchange)
{
    search_finish(http_call(exchange));
}

static void search_on_worker(struct worker_task *task)
{
    search_finish((struct entity_call *)task);
}

/* On an engine's thread: hand over, do nothing here. */
static void search_done(void *context)
{
    struct entity_call *call = context;
    const struct search_request *request = &call->search.request;
    uint64_t rows = (uint64_t)request->query_count * (uint32_t)request->limit;
    struct error err = ERROR_INIT;

    if (rows <= (plan_fetches(&call->plan) ? INLINE_FETCH_MAX : INLINE_ROWS_MAX)) {
        http_continue(call->exchange, search_on_http);
        return;
    }
    call->task.fn = search_on_worker;
    if (worker_submit(api_service(call->exchange)->workers, &call->task, &err) < 0)
        fail_error(call->exchange, &err);
}

/* Exact scores come from the vectors as they were given: those must still be there. */
static int check_exact_scores(const struct index_directory *index, uint32_t field, const char *name,
                              struct failure *failure)
{
    for (uint32_t i = 0; i < index->segment_count; i++) {
        if (field < index->segments[i].field_count && index->segments[i].fields[field] &&
            !disk_index_has_vectors(index->segments[i].fields[field]))
            return failure_set(failure, FAILURE_INVALID_PARAMETER,
                               "exact_scores: the original vectors of field %s were not kept when "
                               "the collection was built: invalid parameter",
                               name);
    }
    return 0;
}

/* The checks in the contract's order: body, required keys, consistency level, collection,
 * parameters, vectors, window, output fields, filter. */
static int search_prepare(struct http_exchange *exchange, struct entity_call *call,
                          struct failure *failure)
{
    struct search_request *request = &call->search.request;
    struct arena *arena = http_arena(exchange);
    const struct schema_field *field;
    const struct index_directory *index;
    size_t bytes;
    const char *body = http_body(exchange, &bytes);

    call->is_search = true;
    if (rest_read_search(body, bytes, arena, &call->search, failure) < 0 ||
        request_check_consistency(request->consistency, failure) < 0 ||
        api_collection(exchange, &call->search.target, &call->collection, failure) < 0)
        return -1;
    index = call->collection->index;
    if (rest_read_search_params(&call->search.search_params, arena, &request->tuning, failure) <
            0 ||
        rest_check_function_score(&call->search.function_score, failure) < 0 ||
        request_vector_field(index->schema, request->anns_field, &call->field, failure) < 0)
        return -1;
    field = schema_vector(index->schema, call->field);
    call->metric = METRIC_COSINE;
    for (uint32_t i = 0; i < index->segment_count; i++) {
        if (call->field < index->segments[i].field_count)
            call->metric = index->segments[i].fields[call->field]->metric;
    }
    if (request_check_metric(&request->tuning, call->metric, failure) < 0 ||
        (request->tuning.exact_scores &&
         check_exact_scores(index, call->field, field->name, failure) < 0) ||
        rest_read_queries(&call->search.data, field->type, field->dim, arena, request, failure) <
            0 ||
        request_check_window(request, failure) < 0 ||
        request_check_partitions(&request->partitions, failure) < 0 ||
        output_plan_make(index->schema, &request->output, false, arena, &call->plan, failure) < 0 ||
        request_check_supported(request, failure) < 0)
        return -1;
    if (request->tuning.beam_width == 0)
        request->tuning.beam_width = api_service(exchange)->beam_width;
    request->tuning.early_reads = api_service(exchange)->early_reads;
    request->deadline_us = http_deadline_us(exchange);
    request->cancelled = http_cancelled(exchange);
    return 0;
}

void api_entities_search(struct http_exchange *exchange)
{
    struct failure failure = {0};
    struct error err = ERROR_INIT;
    struct entity_call *call = call_new(exchange, &failure);

    if (!call || search_prepare(exchange, call, &failure) < 0) {
        if (call && call->collection)
            atomic_fetch_add(&call->collection->metrics.searches_failed, 1);
        api_fail(exchange, &failure);
        return;
    }
    http_defer(exchange);
    if (collection_search_start(api_service(exchange)->engine, call->collection->index, call->field,
                                &call->search.request, http_arena(exchange), search_done, call,
                                &call->running, &err) < 0) {
        atomic_fetch_add(&call->collection->metrics.searches_failed, 1);
        fail_error(exchange, &err);
    }
}

/* Get. */

static void get_finish(struct entity_call *call)
{
    struct reader *reader = NULL;
    struct error err = ERROR_INIT;

    if (service_reader(api_service(call->exchange), &reader, &err) < 0 ||
        collection_rows_find(call->collection->index, reader, call->get.request.keys,
                             call->get.request.key_count, http_arena(call->exchange), &call->rows,
                             &call->row_count, &err) < 0) {
        fail_error(call->exchange, &err);
        return;
    }
    atomic_fetch_add(&call->collection->metrics.gets, 1);
    reply_rows(call);
}

static void get_on_worker(struct worker_task *task)
{
    get_finish((struct entity_call *)task);
}

static int get_prepare(struct http_exchange *exchange, struct entity_call *call,
                       struct failure *failure)
{
    struct get_request *request = &call->get.request;
    struct arena *arena = http_arena(exchange);
    const struct schema_field *key;
    size_t bytes;
    const char *body = http_body(exchange, &bytes);

    if (rest_read_get(body, bytes, arena, &call->get, failure) < 0 ||
        request_check_consistency(request->consistency, failure) < 0 ||
        api_collection(exchange, &call->get.target, &call->collection, failure) < 0)
        return -1;
    key = schema_key(call->collection->index->schema);
    if (!key)
        return failure_set(failure, FAILURE_BAD_KEY, "the collection has no primary key");
    if (rest_read_keys(&call->get.id, key->type, arena, request, failure) < 0 ||
        request_check_partitions(&request->partitions, failure) < 0)
        return -1;
    return output_plan_make(call->collection->index->schema, &request->output, true, arena,
                            &call->plan, failure);
}

void api_entities_get(struct http_exchange *exchange)
{
    struct failure failure = {0};
    struct error err = ERROR_INIT;
    struct entity_call *call = call_new(exchange, &failure);

    if (!call || get_prepare(exchange, call, &failure) < 0) {
        api_fail(exchange, &failure);
        return;
    }
    if (call->get.request.key_count <= INLINE_FETCH_MAX) {
        get_finish(call);
        return;
    }
    call->task.fn = get_on_worker;
    http_defer(exchange);
    if (worker_submit(api_service(exchange)->workers, &call->task, &err) < 0)
        fail_error(exchange, &err);
}
