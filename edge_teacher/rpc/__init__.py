"""Request and response over MQTT 5: call, serve, chunks, and one seam to the network."""
