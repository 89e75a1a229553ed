/* metrics: what /metrics shows, as Prometheus text. Counters are atomics: any thread. */
#ifndef ANND_SRC_METRICS_H
#define ANND_SRC_METRICS_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define METRICS_BUCKET_COUNT 18u /* 1, 2, 4 ... 131072 ms; beyond: only in the count */

struct histogram {
    _Atomic uint64_t buckets[METRICS_BUCKET_COUNT];
    _Atomic uint64_t count;
    _Atomic uint64_t sum_us;
};

/* Of one collection. */
struct collection_metrics {
    _Atomic uint64_t searches;
    _Atomic uint64_t searches_failed;
    _Atomic uint64_t queries; /* query vectors */
    _Atomic uint64_t gets;
    _Atomic uint64_t rounds;
    _Atomic uint64_t reads;
    _Atomic uint64_t resident_hits;
    _Atomic uint64_t exact;
    struct histogram search_latency;
};

void histogram_add(struct histogram *histogram, uint64_t latency_us);

struct service;
struct http_server;

/* The whole page, malloc'ed; NULL when memory is out. */
char *metrics_write(const struct service *service, struct http_server *http, size_t *bytes);

#endif
