"""Training of Q-RAG models (PQN) on support-chunk annotations."""
