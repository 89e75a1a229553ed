/* The page is written into a memory stream: a few kilobytes, once per scrape. */
#include "src/metrics.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "src/http.h"
#include "src/service.h"

#ifndef ANND_VERSION
#define ANND_VERSION "0.1.0"
#endif

/* Reads of a query: closest where most queries are. */
static const uint32_t read_bounds[METRICS_BUCKET_COUNT] = {
    0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 4096};

static void histogram_add(struct histogram *histogram, uint32_t bucket, uint64_t value)
{
    if (bucket < METRICS_BUCKET_COUNT)
        atomic_fetch_add(&histogram->buckets[bucket], 1);
    atomic_fetch_add(&histogram->count, 1);
    atomic_fetch_add(&histogram->sum, value);
}

void histogram_add_latency(struct histogram *histogram, uint64_t latency_us)
{
    uint32_t bucket = 0;

    while (bucket < METRICS_BUCKET_COUNT && latency_us > (UINT64_C(1000) << bucket))
        bucket++;
    histogram_add(histogram, bucket, latency_us);
}

void histogram_add_reads(struct histogram *histogram, uint64_t reads)
{
    uint32_t bucket = 0;

    while (bucket < METRICS_BUCKET_COUNT && reads > read_bounds[bucket])
        bucket++;
    histogram_add(histogram, bucket, reads);
}

static void head(FILE *out, const char *name, const char *type, const char *help)
{
    fprintf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void single(FILE *out, const char *name, const char *type, const char *help, uint64_t value)
{
    head(out, name, type, help);
    fprintf(out, "%s %" PRIu64 "\n", name, value);
}

struct per_collection {
    const char *name;
    const char *labels; /* before db_name and collection_name */
    const char *help;   /* NULL: the name continues */
    size_t offset;      /* of the counter */
};

/* Collection names are identifiers: no label needs escapes. Rows of one name with different labels
 * stand together and share the first one's help. */
static void collections(FILE *out, const struct service *service, const struct per_collection *m)
{
    if (m->help)
        head(out, m->name, "counter", m->help);
    for (uint32_t i = 0; i < service->collection_count; i++) {
        const struct collection *c = &service->collections[i];
        const _Atomic uint64_t *counter =
            (const _Atomic uint64_t *)((const char *)&c->metrics + m->offset);

        fprintf(out, "%s{%sdb_name=\"%s\",collection_name=\"%s\"} %" PRIu64 "\n", m->name,
                m->labels, c->database, c->name, atomic_load(counter));
    }
}

static void histogram_write(FILE *out, const char *name, const char *labels,
                            const struct collection *c, const struct histogram *h,
                            const uint32_t *bounds, double sum_scale)
{
    uint64_t below = 0;

    for (uint32_t b = 0; b < METRICS_BUCKET_COUNT; b++) {
        below += atomic_load(&h->buckets[b]);
        fprintf(out, "%s_bucket{%sdb_name=\"%s\",collection_name=\"%s\",le=\"%u\"} %" PRIu64 "\n",
                name, labels, c->database, c->name, bounds ? bounds[b] : 1u << b, below);
    }
    fprintf(out, "%s_bucket{%sdb_name=\"%s\",collection_name=\"%s\",le=\"+Inf\"} %" PRIu64 "\n",
            name, labels, c->database, c->name, atomic_load(&h->count));
    fprintf(out, "%s_sum{%sdb_name=\"%s\",collection_name=\"%s\"} %.3f\n", name, labels,
            c->database, c->name, (double)atomic_load(&h->sum) * sum_scale);
    fprintf(out, "%s_count{%sdb_name=\"%s\",collection_name=\"%s\"} %" PRIu64 "\n", name, labels,
            c->database, c->name, atomic_load(&h->count));
}

static void histograms(FILE *out, const struct service *service)
{
    const char *latency = "milvus_proxy_sq_latency";
    const char *reads = "annd_search_reads_per_query";

    head(out, latency, "histogram", "milliseconds from the request's headers to its answer");
    for (uint32_t i = 0; i < service->collection_count; i++)
        histogram_write(out, latency, "node_id=\"1\",query_type=\"search\",",
                        &service->collections[i], &service->collections[i].metrics.search_latency,
                        NULL, 1e-3);
    head(out, reads, "histogram", "4 KiB reads of one query vector, all segments");
    for (uint32_t i = 0; i < service->collection_count; i++)
        histogram_write(out, reads, "", &service->collections[i],
                        &service->collections[i].metrics.search_reads, read_bounds, 1);
}

static void entities(FILE *out, const struct service *service)
{
    head(out, "milvus_rootcoord_entity_num", "gauge", "rows of a collection");
    for (uint32_t i = 0; i < service->collection_count; i++) {
        const struct collection *c = &service->collections[i];
        uint64_t rows = c->index ? c->index->row_count : 0;

        fprintf(out,
                "milvus_rootcoord_entity_num{db_name=\"%s\",collection_name=\"%s\","
                "status=\"total\"} %" PRIu64 "\n"
                "milvus_rootcoord_entity_num{db_name=\"%s\",collection_name=\"%s\","
                "status=\"loaded\"} %" PRIu64 "\n",
                c->database, c->name, rows, c->database, c->name, rows);
    }
    head(out, "annd_collection_memory_bytes", "gauge", "resident for a collection");
    for (uint32_t i = 0; i < service->collection_count; i++) {
        const struct collection *c = &service->collections[i];

        fprintf(out,
                "annd_collection_memory_bytes{db_name=\"%s\",collection_name=\"%s\"} %" PRIu64 "\n",
                c->database, c->name, c->index ? c->index->memory_bytes : 0);
    }
}

static void transport(FILE *out, struct http_server *http)
{
    struct http_counters c;

    http_server_counters(http, &c);
    single(out, "annd_http_connections_total", "counter", "connections accepted", c.connections);
    single(out, "annd_http_connections_refused_total", "counter", "over a limit",
           c.connections_refused);
    single(out, "annd_http_connections_expired_total", "counter", "closed at a deadline",
           c.connections_expired);
    single(out, "annd_http_requests_total", "counter", "requests with complete headers",
           c.requests);
    single(out, "annd_http_requests_refused_total", "counter", "refused before a handler",
           c.requests_refused);
    single(out, "annd_http_received_bytes_total", "counter", "bytes of request bodies",
           c.received_bytes);
    single(out, "annd_http_sent_bytes_total", "counter", "bytes of answers", c.sent_bytes);
    single(out, "annd_http_connections_open", "gauge", "open now", c.connections_open);
    single(out, "annd_http_requests_running", "gauge", "under way now", c.requests_running);
}

char *metrics_write(const struct service *service, struct http_server *http, size_t *bytes)
{
#define AT(member) offsetof(struct collection_metrics, member)
    static const struct per_collection counters[] = {
        {"milvus_proxy_search_vectors_count", "node_id=\"1\",", "query vectors searched",
         AT(queries)},
        {"annd_searches_total", "", "searches answered", AT(searches)},
        {"annd_searches_failed_total", "", "searches refused or failed", AT(searches_failed)},
        {"annd_searches_expired_total", "", "of the failed ones, at their deadline",
         AT(searches_expired)},
        {"annd_searches_cancelled_total", "", "of the failed ones, because the client left",
         AT(searches_cancelled)},
        {"annd_gets_total", "", "gets answered", AT(gets)},
        {"annd_search_rounds_total", "", "dependent read steps", AT(rounds)},
        {"annd_search_reads_total", "", "4 KiB reads", AT(reads)},
        {"annd_search_resident_pages_total", "", "pages taken from memory", AT(resident_hits)},
        {"annd_search_codes_scanned_total", "", "codes estimated in scanned cells", AT(scanned)},
        {"annd_search_estimates_total", "", "codes estimated as neighbours", AT(estimates)},
        {"annd_search_distances_total", "", "stored vectors scored", AT(exact)},
        {"annd_search_stops_total", "reason=\"gain\",",
         "walks ended, one a query and segment, by what ended them", AT(stops[STOP_GAIN])},
        {"annd_search_stops_total", "reason=\"list\",", NULL, AT(stops[STOP_LIST])},
        {"annd_search_stops_total", "reason=\"reads\",", NULL, AT(stops[STOP_READS])},
    };
#undef AT
    char *text = NULL;
    FILE *out = open_memstream(&text, bytes);

    if (!out)
        return NULL;
    head(out, "milvus_build_info", "gauge", "what is running");
    fprintf(out, "milvus_build_info{version=\"annd-%s\",built=\"\",git_commit=\"\"} 1\n",
            ANND_VERSION);
    head(out, "milvus_num_node", "gauge", "nodes by role");
    fprintf(out, "milvus_num_node{node_id=\"1\",role_name=\"standalone\"} 1\n");
    head(out, "milvus_rootcoord_collection_num", "gauge", "collections");
    fprintf(out, "milvus_rootcoord_collection_num{db_name=\"default\"} %u\n",
            service->collection_count);
    single(out, "annd_collections_damaged", "gauge", "collections that could not be opened",
           service->damaged_count);
    single(out, "annd_memory_budget_bytes", "gauge", "what --memory grants", service->memory_bytes);
    single(out, "annd_memory_used_bytes", "gauge", "indexes and search scratch",
           service->memory_used);
    single(out, "annd_uptime_seconds", "gauge", "since start",
           (http_now_us() - service->started_us) / 1000000);
    entities(out, service);
    for (size_t i = 0; i < sizeof counters / sizeof counters[0]; i++)
        collections(out, service, &counters[i]);
    histograms(out, service);
    transport(out, http);
    if (fclose(out) != 0) {
        free(text);
        return NULL;
    }
    return text;
}
