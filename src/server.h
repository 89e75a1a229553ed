/* server: `annd serve`, from options to exit: order of start and stop, signals. */
#ifndef ANND_SRC_SERVER_H
#define ANND_SRC_SERVER_H

#include <stdbool.h>
#include <stdint.h>

#include "storage/base/error.h"
#include "storage/reader.h"

#define SERVER_LISTEN_DEFAULT "127.0.0.1:19530"
#define SERVER_METRICS_PORT_DEFAULT 9091u

struct server_options {
    const char *data;           /* the data directory */
    const char *listen;         /* "ADDR:PORT"; NULL: SERVER_LISTEN_DEFAULT */
    const char *metrics_listen; /* "ADDR:PORT" or "off"; NULL: the same address, port 9091 */
    uint64_t memory_bytes;      /* 0: half of what there is */
    enum reader_backend backend;
    uint32_t threads;    /* of search; 0: one per CPU */
    bool prefer_latency; /* of single searches, at the cost of how many are done a second */
    bool insecure;       /* may listen where others can reach it */
};

/* Serves until SIGTERM or SIGINT, then drains for up to 30 s and returns 0; a second signal ends
 * the process at once. Takes over signals and standard error of the process: call it from main,
 * before any thread exists. -1: did not start. */
int server_run(const struct server_options *options, struct error *err);

#endif
