"""What a run says about itself: metrics files, the console, throughput and plots."""
