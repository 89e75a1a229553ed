/* metrics: what /metrics shows, as Prometheus text. Counters are atomics: any thread. */
#ifndef ANND_SRC_METRICS_H
#define ANND_SRC_METRICS_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "index/disk_search.h"

#define METRICS_BUCKET_COUNT 18u

/* What exceeds the last bound is only in the count. */
struct histogram {
    _Atomic uint64_t buckets[METRICS_BUCKET_COUNT];
    _Atomic uint64_t count;
    _Atomic uint64_t sum;
};

/* Of one collection. */
struct collection_metrics {
    _Atomic uint64_t searches;
    _Atomic uint64_t searches_failed;
    _Atomic uint64_t searches_expired;   /* of the failed ones, at their deadline */
    _Atomic uint64_t searches_cancelled; /* of the failed ones, because the client left */
    _Atomic uint64_t queries;            /* query vectors */
    _Atomic uint64_t gets;
    _Atomic uint64_t rounds;
    _Atomic uint64_t reads;
    _Atomic uint64_t resident_hits;
    _Atomic uint64_t scanned;
    _Atomic uint64_t estimates;
    _Atomic uint64_t exact;
    _Atomic uint64_t stops[STOP_READS + 1]; /* walks, by enum search_stop */
    struct histogram search_latency;        /* bounds 1, 2, 4 ... 131072 ms; the sum in us */
    struct histogram search_reads;          /* of a query, all segments */
};

void histogram_add_latency(struct histogram *histogram, uint64_t latency_us);
void histogram_add_reads(struct histogram *histogram, uint64_t reads);

struct service;
struct http_server;

/* The whole page, malloc'ed; NULL when memory is out. */
char *metrics_write(const struct service *service, struct http_server *http, size_t *bytes);

#endif
