// Reads the topic `decisions` as anybody would in Go: franz-go fetches, its registry client finds the schema by the id in front of
// each record, hamba/avro decodes. Nothing of Foldflow's is used. Prints one JSON line for each record, up to the topic's end.
//
//	go run . 127.0.0.1:29092 foldflow.decisions http://127.0.0.1:29094/registry
package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/hamba/avro/v2"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sr"
)

type line struct {
	RunID   string   `json:"run_id"`
	Seq     int64    `json:"seq"`
	Prev    string   `json:"prev"`
	At      int64    `json:"at"`
	Input   string   `json:"input"`
	Effects []string `json:"effects"`
}

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: decisions BROKERS TOPIC REGISTRY_URL")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := run(ctx, os.Args[1], os.Args[2], os.Args[3]); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, brokers, topic, url string) error {
	client, err := kgo.NewClient(
		kgo.SeedBrokers(brokers),
		kgo.ConsumeTopics(topic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
	)
	if err != nil {
		return err
	}
	defer client.Close()
	registry, err := sr.NewClient(sr.URLs(url))
	if err != nil {
		return err
	}
	ends, err := kadm.NewClient(client).ListEndOffsets(ctx, topic)
	if err != nil {
		return err
	}
	left := map[int32]int64{}
	ends.Each(func(end kadm.ListedOffset) {
		if end.Offset > 0 {
			left[end.Partition] = end.Offset
		}
	})
	schemas, out := map[int]avro.Schema{}, json.NewEncoder(os.Stdout)
	for len(left) > 0 {
		fetches := client.PollFetches(ctx)
		if err := fetches.Err(); err != nil {
			return err
		}
		for _, record := range fetches.Records() {
			if record.Offset+1 >= left[record.Partition] {
				delete(left, record.Partition)
			}
			decoded, err := decode(ctx, registry, schemas, record.Value)
			if err != nil {
				return fmt.Errorf("%d/%d: %w", record.Partition, record.Offset, err)
			}
			if err := out.Encode(decoded); err != nil {
				return err
			}
		}
	}
	return nil
}

func decode(ctx context.Context, registry *sr.Client, schemas map[int]avro.Schema, value []byte) (*line, error) {
	id, body, err := (&sr.ConfluentHeader{}).DecodeID(value)
	if err != nil {
		return nil, err
	}
	if schemas[id] == nil {
		found, err := registry.SchemaByID(ctx, id)
		if err != nil {
			return nil, err
		}
		if schemas[id], err = avro.Parse(found.Schema); err != nil {
			return nil, err
		}
	}
	var decision map[string]any
	if err := avro.Unmarshal(schemas[id], body, &decision); err != nil {
		return nil, err
	}
	said := &line{
		RunID: decision["run_id"].(string),
		Seq:   decision["seq"].(int64),
		Prev:  hex.EncodeToString(decision["prev"].([]byte)),
		At:    decision["at"].(time.Time).UnixMilli(),
		Input: branch(decision["input"]),
	}
	for _, effect := range decision["effects"].([]any) {
		said.Effects = append(said.Effects, branch(effect))
	}
	return said, nil
}

// branch returns which record of a union this is: hamba/avro gives {"full name": fields}.
func branch(union any) string {
	for name := range union.(map[string]any) {
		return name
	}
	return ""
}
